import { readEnvironment } from './environment.ts'
import { freePort, run, say, withPostgres } from './run.ts'
import { serve } from './serve.ts'

await run(async (signal) => {
  const environment = readEnvironment(process.env)
  await freePort(environment.port)
  await withPostgres(environment, signal, async (connectionString) => {
    try {
      await serve({ port: environment.port, connectionString, signal, listening })
    } finally {
      if (signal.aborted) say('The app is closed')
    }
  })
})

function listening(url: string, lines: string[]): void {
  say(`The app listens on ${url} and can be tried in another terminal:\n`)
  for (const line of lines) say(line)
  say(`\nWhat its pool is doing is on ${url}/db while they run. Ctrl-C stops it.`)
}
