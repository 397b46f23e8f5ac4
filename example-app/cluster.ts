import cluster from 'node:cluster'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { readEnvironment } from './environment.ts'
import { Fleet } from './fleet.ts'
import { freePort, run, say, withPostgres } from './run.ts'

// `npm run start:cluster`: the example app in several processes on one port. This one starts them, and serves nothing.

await run(async (signal) => {
  const environment = readEnvironment(process.env)
  // Chosen here, so that a worker that is replaced comes back to the same one.
  const port = await freePort(environment.port)
  await withPostgres(environment, signal, (connectionString) =>
    serveFromWorkers(environment.workers, connectionString, port, signal),
  )
})

async function serveFromWorkers(size: number, connectionString: string, port: number, signal: AbortSignal) {
  // Each worker accepts for itself. A connection that the first process hands to a worker which is killed just then would
  // be neither served nor closed.
  cluster.schedulingPolicy = cluster.SCHED_NONE
  cluster.setupPrimary({ exec: fileURLToPath(new URL('cluster-worker.ts', import.meta.url)) })
  // A worker does not see the others: by WEB_CONCURRENCY the capacity check knows how many share the server.
  const env = { DATABASE_URL: connectionString, PORT: String(port), WEB_CONCURRENCY: String(size) }
  const fleet = new Fleet({ size, env, say })
  try {
    const { url, lines } = await fleet.start(signal)
    say(`${size} workers listen on ${url} and can be tried in another terminal:\n`)
    for (const line of lines) say(line)
    say('\nThe header x-worker of an answer says whose it is. Ctrl-C stops them.')
    if (!signal.aborted) await once(signal, 'abort')
  } finally {
    await fleet.stop()
    if (signal.aborted) say('The workers are stopped')
  }
}
