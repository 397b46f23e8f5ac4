import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type { Response } from 'light-my-request'
import type { Test } from 'tap'
import type { RequestDbOptions, RouteDbOptions, Session } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import { type CapturedLog, captureLog } from './captured-log.ts'
import type { Database } from './database.ts'
import { type PostgresProxy, startProxy } from './proxy.ts'

/** What answers the one route. `db` is its `request.db`. */
export type Handler = (db: Session, request: FastifyRequest, reply: FastifyReply) => unknown

export interface OneRoute {
  readonly app: FastifyInstance
  readonly log: CapturedLog
  /** One request to it. */
  post(): Promise<Response>
}

export interface OneRouteOptions extends RequestDbOptions {
  /** `config.db` of the route. */
  readonly route?: RouteDbOptions
  /** Declares further routes. */
  readonly beside?: (app: FastifyInstance) => void
}

/** An app whose route POST / is `handler`; its log is kept instead of written. */
export async function oneRoute(
  t: Test,
  database: Database,
  handler: Handler,
  { route, beside, ...options }: OneRouteOptions = {},
): Promise<OneRoute> {
  const log = captureLog()
  const routes = (app: FastifyInstance) => {
    const config = route === undefined ? {} : { db: route }
    app.post('/', { config }, async (request, reply) => handler(request.db, request, reply))
    beside?.(app)
  }
  const app = await buildApp(t, database, options, routes, { logger: log.options })
  return { app, log, post: () => app.inject({ method: 'POST', url: '/' }) }
}

/**
 * The same with a recording proxy in between, and with one connection open already, so that what the proxy has seen is
 * what the request sent.
 */
export async function oneRouteThroughProxy(
  t: Test,
  database: Database,
  handler: Handler,
  options: OneRouteOptions = {},
): Promise<OneRoute & { readonly proxy: PostgresProxy }> {
  const proxy = await startProxy(t, database.connectionString)
  const { connectionString } = proxy
  const made = await oneRoute(t, database, handler, { connectionString, pool: { prePing: false }, ...options })
  const db = (made.app as unknown as Record<string, { ping(): Promise<number> }>)[options.decorator ?? 'db']!
  await db.ping()
  proxy.clear()
  return { ...made, proxy }
}
