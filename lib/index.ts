import type { FastifyInstance, FastifyPluginAsync, FastifyRequest, RouteOptions } from 'fastify'
import fp from 'fastify-plugin'
import { retrying } from './attempts.ts'
import { checkOptions, checkRouteOptions } from './check-options.ts'
import { findSession, follow } from './context.ts'
import { Database } from './database.ts'
import { Engine } from './engine.ts'
import { AlreadyRegistered } from './errors.ts'
import { Lifecycle } from './lifecycle.ts'
import { listen } from './observe/channels.ts'
import { echoTo } from './observe/echo.ts'
import type { EffectiveOptions, RequestDbOptions, RouteDbOptions } from './options.ts'
import type { Session as SessionOf } from './session/session.ts'

/** Your tables. Merge them in: `declare module 'fastify-request-db' { interface DatabaseSchema { trips: TripTable } }`. */
// biome-ignore lint/suspicious/noEmptyInterface: it is filled by declaration merging
export interface DatabaseSchema {}

/** `request.db`, and what `fastify.db.session(fn)` hands to `fn`. */
export type Session<DB = DatabaseSchema> = SessionOf<DB>

async function requestDb(fastify: FastifyInstance, input: RequestDbOptions): Promise<void> {
  const options = checkOptions(input)
  const { name } = options.pool
  if (fastify.hasDecorator(name) || fastify.hasRequestDecorator(name)) throw new AlreadyRegistered(name)

  const engine = new Engine(options, fastify.log)
  const stopEcho = echoTo(engine.pool, options)
  const lifecycle = new Lifecycle(engine)
  const { slots } = lifecycle
  fastify.decorate(name, new Database<DatabaseSchema>(engine))
  const { reply, session, payload, over, origin, context } = slots
  for (const slot of [reply, session, payload, over, origin, context]) fastify.decorateRequest(slot, null)
  if (options.asyncContext) follow(name)
  fastify.decorateRequest(name, {
    getter(this: FastifyRequest) {
      return lifecycle.session(this)
    },
  })

  fastify.addHook('onRoute', (route: RouteOptions) => markRoute(route, lifecycle, options))
  fastify.addHook('onRequest', lifecycle.onRequest)
  if (options.asyncContext) fastify.addHook('preValidation', lifecycle.reenter)
  fastify.addHook('onSend', lifecycle.onSendFirst)
  fastify.addHook('onError', lifecycle.onError)
  fastify.addHook('onResponse', lifecycle.onResponse)

  fastify.addHook('preClose', (done) => {
    engine.startClosing()
    done()
  })
  fastify.addHook('onClose', () => engine.close().finally(stopEcho))

  const { connection: _, ...sizes } = options.pool
  fastify.log.info(
    { requestDb: sizes },
    `request-db: pool "${name}" of size ${sizes.size} overflow ${sizes.maxOverflow}`,
  )
}

/**
 * The session that the running code belongs to: `request.db` of the request, or that of `fastify.db.session(fn)`, for
 * registrations with `asyncContext: true`. `decorator` is the registration's name, `'db'` by default.
 * @throws NO_SESSION outside of both, SESSION_ENDED when it has ended. SQLAlchemy: `async_scoped_session`.
 */
export function currentSession(decorator?: string): Session
export function currentSession<DB>(decorator?: string): Session<DB>
export function currentSession<DB>(decorator = 'db'): Session<DB> {
  return findSession(decorator) as unknown as Session<DB>
}

/** A route's own options, and our settling hook behind all of its others. The HEAD route of a GET comes here too. */
function markRoute(route: RouteOptions, { slots, onSendLast, open }: Lifecycle, options: EffectiveOptions): void {
  const { name } = options.pool
  const config = (route.config ?? {}) as Record<string, unknown>
  const own = Object.hasOwn(config, name) ? config[name] : undefined
  const effective = checkRouteOptions(options.route, own, `config.${name} of ${String(route.method)} ${route.url}`)
  route.config = { ...route.config, [slots.route]: effective } as typeof route.config & object
  route.onSend = [...[route.onSend ?? []].flat(), onSendLast] as NonNullable<RouteOptions['onSend']>
  if (effective.retry !== undefined) route.handler = retrying(route.handler, effective.retry, open)
}

/**
 * The plugin: `await app.register(requestDb, { connectionString })`. @throws INVALID_OPTION, ALREADY_REGISTERED.
 * SQLAlchemy: `create_engine` and `sessionmaker`.
 */
const plugin: FastifyPluginAsync<RequestDbOptions> = fp(requestDb, { fastify: '^5.12.0', name: 'fastify-request-db' })
// For require('fastify-request-db'), which is the plugin: what import has beside it.
Object.assign(plugin, { default: plugin, requestDb: plugin, currentSession, listen })

export type { Database } from './database.ts'
export type { RequestDbError } from './errors.ts'
export type { Cause, Verdict } from './observe/cause.ts'
export type {
  BeginEvent,
  CheckinEvent,
  CheckoutEvent,
  CloseEvent,
  CommitEvent,
  ConnectEvent,
  Events,
  InvalidateEvent,
  LeakEvent,
  Listeners,
  ReportEvent,
  ResetEvent,
  RollbackEvent,
  StatementEvent,
  WaitEvent,
} from './observe/channels.ts'
export type { HolderGroup, Report, WaiterGroup } from './observe/report.ts'
export type { HolderSnapshot, ObservedPool, Snapshot, Totals, WaiterSnapshot, Who } from './observe/snapshot.ts'
export type {
  CommitOn,
  Echo,
  IsolationLevel,
  PoolOptions,
  PrePingOptions,
  PreparedStatementsOptions,
  RequestDbOptions,
  ResetOnReturn,
  RetryOn,
  RetryOptions,
  RouteDbOptions,
  SessionOptions,
  SettingValue,
  ShouldCommit,
} from './options.ts'
export type { Callback } from './session/scope.ts'
export type { SessionState } from './session/transaction.ts'
// So that require('fastify-request-db') is the plugin.
export { listen, plugin as default, plugin as requestDb, plugin as 'module.exports' }

declare module 'fastify' {
  interface FastifyInstance {
    /** The pool of this process, and sessions outside of a request. */
    db: Database<DatabaseSchema>
  }
  interface FastifyRequest {
    /** This request's database session. */
    readonly db: SessionOf<DatabaseSchema>
  }
  interface FastifyContextConfig {
    /** This route's options of fastify-request-db. */
    db?: RouteDbOptions
  }
}
