import { once } from 'node:events'
import type { FastifyInstance } from 'fastify'
import { buildApp } from './app.ts'
import { curlLines } from './curl.ts'
import { makeMailer } from './mailer.ts'
import { reasonOf } from './reason.ts'
import { suggestRoutes } from './repositories/flights.ts'
import { HOST, say } from './run.ts'
import { worker } from './worker.ts'

const CLOSE_WITHIN_MILLIS = 3000

export interface ServeOptions {
  port: number
  connectionString: string
  /** Until it aborts. */
  signal: AbortSignal
  /** Adds to the app what it does not have by itself. */
  prepare?: (app: FastifyInstance) => void
  /** Told when it listens: where, and what can be tried. */
  listening: (url: string, lines: string[]) => void
}

/** The example app, and its worker beside it. */
export async function serve({ port, connectionString, signal, prepare, listening }: ServeOptions): Promise<void> {
  signal.throwIfAborted()
  const mailer = makeMailer(say)
  const app = buildApp({ connectionString, mailer, logger: { level: 'warn' } })
  prepare?.(app)
  app.register(worker, { mailer })
  try {
    await ready(app, connectionString)
    const url = await app.listen({ port, host: HOST })
    const routes = await app.db.session({ readOnly: true }, suggestRoutes)
    signal.throwIfAborted()
    listening(url, curlLines(url, routes))
    await once(signal, 'abort')
  } finally {
    // Someone who keeps a connection open without asking for anything could hold this up for ever.
    const impatience = setTimeout(() => app.server.closeAllConnections(), CLOSE_WITHIN_MILLIS)
    await app.close()
    clearTimeout(impatience)
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
