import { once } from 'node:events'
import { createServer } from 'node:net'
import type { FastifyInstance } from 'fastify'
import { buildApp } from './app.ts'
import { curlLines } from './curl.ts'
import { readEnvironment } from './environment.ts'
import { makeMailer } from './mailer.ts'
import { stopWithNpm } from './npm.ts'
import { startPostgres } from './postgres.ts'
import { reasonOf } from './reason.ts'
import { suggestRoutes } from './repositories/flights.ts'
import { worker } from './worker.ts'

const HOST = '127.0.0.1'
const CLOSE_WITHIN_MILLIS = 3000

const say = (line: string) => console.log(line)
// A terminal that is closed takes nothing more, which must not keep PostgreSQL from being stopped.
process.stdout.on('error', () => {})

// The handlers stay, so that a second Ctrl-C does not cut the first one short.
const stopping = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stopping.abort())
stopWithNpm(() => stopping.abort())
stopping.signal.addEventListener('abort', () => say('\nStopping'))

try {
  await main()
} catch (error) {
  if (error !== stopping.signal.reason) {
    console.error(error instanceof Error ? error.message : error)
    process.exitCode = 1
  }
}

async function main(): Promise<void> {
  const { port, dataFolder, databaseUrl } = readEnvironment(process.env)
  await assertFree(port)
  if (databaseUrl) return serve(port, databaseUrl)
  const postgres = await startPostgres({ folder: dataFolder, say }).catch((error: unknown) => {
    // Ctrl-C ends initdb too. That is no failure.
    stopping.signal.throwIfAborted()
    throw error
  })
  try {
    say(`PostgreSQL listens on ${HOST}:${postgres.port}`)
    await serve(port, postgres.connectionString)
  } finally {
    await postgres.stop()
    if (stopping.signal.aborted) say('PostgreSQL is stopped')
  }
}

/** Until somebody wants it to stop. */
async function serve(port: number, connectionString: string): Promise<void> {
  stopping.signal.throwIfAborted()
  const mailer = makeMailer(say)
  const app = buildApp({ connectionString, mailer, logger: { level: 'warn' } })
  app.register(worker, { mailer })
  try {
    await ready(app, connectionString)
    const url = await app.listen({ port, host: HOST })
    const routes = await app.db.session({ readOnly: true }, suggestRoutes)
    stopping.signal.throwIfAborted()
    say(`The app listens on ${url} and can be tried in another terminal:\n`)
    for (const line of curlLines(url, routes)) say(line)
    say(`\nWhat its pool is doing is on ${url}/db while they run. Ctrl-C stops it.`)
    await once(stopping.signal, 'abort')
  } finally {
    // Someone who keeps a connection open without asking for anything could hold this up for ever.
    const impatience = setTimeout(() => app.server.closeAllConnections(), CLOSE_WITHIN_MILLIS)
    await app.close()
    clearTimeout(impatience)
    if (stopping.signal.aborted) say('The app is closed')
  }
}

async function ready(app: FastifyInstance, connectionString: string): Promise<void> {
  try {
    await app.ready()
  } catch (error) {
    const { host, pathname } = new URL(connectionString)
    throw new Error(`The database ${host}${pathname} cannot be used: ${reasonOf(error)}`)
  }
}

/** Before PostgreSQL is started for nothing. */
async function assertFree(port: number): Promise<void> {
  const probe = createServer().listen(port, HOST)
  try {
    await once(probe, 'listening')
  } catch (error) {
    const inUse = error instanceof Error && 'code' in error && error.code === 'EADDRINUSE'
    throw new Error(inUse ? `Port ${port} is in use: free it, or set PORT to another` : reasonOf(error))
  }
  probe.close()
  await once(probe, 'close')
}
