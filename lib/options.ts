import type { FastifyReply, FastifyRequest } from 'fastify'
import type { KyselyPlugin } from 'kysely'
import type { ClientConfig } from 'pg'
import { InvalidOption } from './errors.ts'
import { ownOptions } from './own-options.ts'
import { checkPooler, type Pooler } from './pooler.ts'

/** When a request's transaction is committed: before the answer leaves, or after it has left. */
export type CommitOn = 'onSend' | 'onResponse'
/** PostgreSQL's isolation levels. SQLAlchemy: `isolation_level`. */
export type IsolationLevel = 'read uncommitted' | 'read committed' | 'repeatable read' | 'serializable'
/** Decides on commit (true) or rollback (false) of a request that threw nothing and whose client is still there. */
export type ShouldCommit = (request: FastifyRequest, reply: FastifyReply) => boolean
/** What a connection is cleaned of between two sessions: its transaction, or all that a session can leave behind. */
export type ResetOnReturn = 'rollback' | 'discard'
/** What `echo` and `echoPool` take. */
export type Echo = boolean | 'debug'
/** Which errors are worth another attempt: their codes, or a rule. */
export type RetryOn = readonly string[] | ((error: Error) => boolean)
/** A value of `settings`. */
export type SettingValue = string | number | boolean

/** Sizes and limits of one process's pool. */
export interface PoolOptions {
  /** Connections kept open, at least 1. Default 10. SQLAlchemy `pool_size`, pg `max`. */
  size?: number | undefined
  /** Connections opened beyond `size` under load and closed on return, at least 0. Default 0. SQLAlchemy `max_overflow`. */
  maxOverflow?: number | undefined
  /**
   * How long a session waits in the queue, in milliseconds; 0 refuses at once. Default 10 000. Opening a connection may
   * take as long again, where `connection.connectionTimeoutMillis` says nothing else. SQLAlchemy `pool_timeout`.
   */
  timeoutMillis?: number | undefined
  /** How many sessions may wait; one more is refused at once. Default 1000. */
  maxWaiting?: number | undefined
  /** Age at which a connection is replaced, in milliseconds, give or take 10 %; false never. Default 1 800 000. SQLAlchemy `pool_recycle`, pg `maxLifetimeSeconds`. */
  recycleMillis?: number | false | undefined
  /** Asks a connection that sat idle whether it is alive before it is used; false never. SQLAlchemy `pool_pre_ping`. */
  prePing?: PrePingOptions | false | undefined
}

/** When an idle connection is asked whether it is alive. */
export interface PrePingOptions {
  /** Idle longer than this, in milliseconds, it is asked. Default 1000. */
  idleMillis?: number | undefined
  /** It must answer within this, in milliseconds, or it is dead. Default 500. */
  timeoutMillis?: number | undefined
}

/** Named statements. SQLAlchemy with asyncpg: `prepared_statement_cache_size`. */
export interface PreparedStatementsOptions {
  /** How many are kept on each connection, at least 1; the least recently used are closed. Default 100. */
  cacheSize?: number | undefined
}

/** Runs a route's handler, or a job's function, again in a new transaction. */
export interface RetryOptions {
  /** How often it runs at most, the first time included; at least 1. Default 3. */
  attempts?: number | undefined
  /**
   * The codes of the errors after which it runs again, PostgreSQL's SQLSTATEs and this plugin's own, or
   * `(error) => boolean`. COMMIT_UNKNOWN is never one of them. Default `['40001', '40P01', 'CONNECTION_LOST']`:
   * a serialization failure, a deadlock, a connection that was lost before COMMIT was sent.
   */
  on?: RetryOn | undefined
}

/** What both the plugin and a single route can say. */
interface SharedOptions {
  /** `'onSend'` commits before the answer leaves, `'onResponse'` after it has left. Default `'onSend'`. */
  commitOn?: CommitOn | undefined
  /** Replaces the rule that a status of 400 or more rolls back. */
  shouldCommit?: ShouldCommit | undefined
  /** Default: the server's, normally read committed. */
  isolationLevel?: IsolationLevel | undefined
  /** Begins transactions READ ONLY. Default false. */
  readOnly?: boolean | ((request: FastifyRequest) => boolean) | undefined
  /** DEFERRABLE: a serializable read-only transaction waits for a safe snapshot. Default false. */
  deferrable?: boolean | undefined
  /** Longest time of one statement in milliseconds, set inside the transaction; false for the server's own. Default false. */
  statementTimeoutMillis?: number | false | undefined
}

/** Options of `fastify.register(requestDb, options)`. */
export interface RequestDbOptions extends SharedOptions {
  /** `postgres://user:password@host:port/database`. This or `connection` is needed. */
  connectionString?: string | undefined
  /** Anything `pg.Client` takes. This or `connectionString` is needed; `{}` takes PGHOST, PGUSER and so on. */
  connection?: ClientConfig | undefined
  /** How many connections, and how long to wait for one. */
  pool?: PoolOptions | undefined
  /** The name of `fastify.db`, `request.db` and `config.db`, of the pool in errors and logs. Default `'db'`. */
  decorator?: string | undefined
  /** Run-time parameters of the request's transaction, such as the tenant of row level security (`set_config(name, value, true)`). */
  settings?: ((request: FastifyRequest) => Record<string, SettingValue>) | undefined
  /** Longest wait for the answer to COMMIT or ROLLBACK, in milliseconds. Default 2000. */
  settleTimeoutMillis?: number | undefined
  /** Longest time a session may hold a connection, in milliseconds; false for no limit. Default false. */
  maxSessionMillis?: number | false | undefined
  /** How long `fastify.close()` lets sessions finish, in milliseconds. Default 5000. */
  closeGraceMillis?: number | undefined
  /**
   * `'rollback'` ends the transaction; what outlives one, such as SET, temporary tables and session locks, stays on the
   * connection. `'discard'` sends DISCARD ALL before the next session's BEGIN, in the same packet. Default `'rollback'`.
   * SQLAlchemy `pool_reset_on_return`, PgBouncer `server_reset_query`.
   */
  resetOnReturn?: ResetOnReturn | undefined
  /** Keeps statements that come again and again parsed on the server, under names. Default false: not through PgBouncer before 1.21. */
  preparedStatements?: PreparedStatementsOptions | false | undefined
  /**
   * `'transaction'`: a PgBouncer that pools transactions stands in between (1.18 or later). Turns off what it breaks:
   * hand-over, the idle ping, named statements, what PostgreSQL would be asked about its backends. Default: none does.
   * SQLAlchemy: NullPool behind PgBouncer.
   */
  pooler?: Pooler | undefined
  /** Kysely's plugins, such as `new CamelCasePlugin()`. */
  plugins?: KyselyPlugin[] | undefined
  /** Logs BEGIN, each statement, COMMIT and ROLLBACK through `request.log`; `'debug'` the rows too. Default false. SQLAlchemy `echo`. */
  echo?: Echo | undefined
  /** Logs what happens to connections: opened, checked out, returned, closed. `'debug'`: and who waits. Default false. SQLAlchemy `echo_pool`. */
  echoPool?: Echo | undefined
  /** Shows the parameters in what `echo` logs. Default false. SQLAlchemy `hide_parameters`. */
  echoParameters?: boolean | undefined
  /**
   * Held for longer than this, in milliseconds, a connection counts as leaked: its holder is logged, with the stack of
   * its check-out. Costs a stack and a timer per check-out. Default false. HikariCP `leakDetectionThreshold`.
   */
  leakDetectionMillis?: number | false | undefined
  /** How many processes like this one share the server. Default: WEB_CONCURRENCY, else what `node:cluster` says, else 1. */
  processes?: number | undefined
  /** Asks the server once whether it has room for all connections of all processes, over a connection of its own. Default true. */
  capacityCheck?: boolean | undefined
  /** Lets `currentSession()` find the session of the running request. Default false: it makes every await dearer on Node 20 and 22. SQLAlchemy `async_scoped_session`. */
  asyncContext?: boolean | undefined
  /** Sends `Server-Timing: db-wait, db-hold, db-busy` with answers of requests that used their session. Default false. */
  serverTiming?: boolean | undefined
}

/** Options of a route, under `config.db`. What is left out is the plugin's. */
export interface RouteDbOptions extends SharedOptions {
  /** Sends statements without BEGIN and COMMIT, each its own. Default false. SQLAlchemy `AUTOCOMMIT`. */
  autocommit?: boolean | undefined
  /** Runs the handler again in a new transaction after a serialization failure and the like. Default false. */
  retry?: RetryOptions | false | undefined
}

/** Options of `fastify.db.session(options, fn)`. */
export interface SessionOptions
  extends Pick<SharedOptions, 'isolationLevel' | 'deferrable' | 'statementTimeoutMillis'> {
  /** As the plugin's, for this session. Default: the plugin's, where that is a boolean. */
  readOnly?: boolean | undefined
  /** No BEGIN: every statement on its own. Default `false`. SQLAlchemy: `AUTOCOMMIT`. */
  autocommit?: boolean | undefined
  /** Set for each of its transactions, as `set_config(name, value, true)` does. Default: none. */
  settings?: Record<string, SettingValue> | undefined
  /** What the holder is called in `snapshot()`. Default `'session'`. */
  name?: string | undefined
  /** Runs `fn` again in a new transaction after a serialization failure and the like. Default false. */
  retry?: RetryOptions | false | undefined
  /** Ends the session when it aborts: what runs is cancelled and rolled back, and `session()` rejects with its reason. */
  signal?: AbortSignal | undefined
  /** Longest time from the call to the result, all attempts and waits included, in milliseconds; then as with `signal`. Default none. */
  deadlineMillis?: number | undefined
}

/** The pool's options as they are in force, SQLAlchemy's `pool.status()` in numbers. */
export interface EffectivePoolOptions {
  readonly name: string
  readonly connection: ClientConfig
  readonly size: number
  readonly maxOverflow: number
  readonly timeoutMillis: number
  readonly maxWaiting: number
  readonly recycleMillis: number
  readonly prePing: { readonly idleMillis: number; readonly timeoutMillis: number } | false
  readonly settleTimeoutMillis: number
  readonly closeGraceMillis: number
  readonly resetOnReturn: ResetOnReturn
  readonly preparedStatements: { readonly cacheSize: number } | false
  readonly pooler: Pooler | false
  readonly leakDetectionMillis: number | false
  readonly processes: number | undefined
  readonly capacityCheck: boolean
}

/** What one session does at BEGIN and COMMIT. */
export interface EffectiveRouteOptions {
  readonly commitOn: CommitOn
  readonly readOnly: boolean | ((request: FastifyRequest) => boolean)
  readonly deferrable: boolean
  readonly autocommit: boolean
  readonly statementTimeoutMillis: number | false
  readonly isolationLevel: IsolationLevel | undefined
  readonly shouldCommit: ShouldCommit | undefined
  readonly retry: EffectiveRetry | undefined
}

/** How often something runs, and after which errors again. */
export interface EffectiveRetry {
  readonly attempts: number
  readonly on: RetryOn
}

/** All of it, checked, filled up with defaults and frozen. */
export interface EffectiveOptions {
  readonly pool: EffectivePoolOptions
  readonly route: EffectiveRouteOptions
  readonly settings: RequestDbOptions['settings']
  readonly maxSessionMillis: number | false
  readonly plugins: readonly KyselyPlugin[]
  readonly echo: Echo
  readonly echoPool: Echo
  readonly echoParameters: boolean
  readonly serverTiming: boolean
  readonly asyncContext: boolean
}

interface Check {
  readonly expected: string
  readonly test: (value: unknown) => boolean
}
type Checks = Record<string, Check>

const MAX_TIMER = 2 ** 31 - 1
const isWhole = (value: unknown, least: number, most: number) =>
  Number.isInteger(value) && (value as number) >= least && (value as number) <= most
const isObject = (value: unknown) => typeof value === 'object' && value !== null && !Array.isArray(value)

const whole = (least: number): Check => ({
  expected: `a whole number of at least ${least}`,
  test: (value) => isWhole(value, least, Number.MAX_SAFE_INTEGER),
})
const millis = (least: number): Check => ({
  expected: `a whole number of milliseconds from ${least} to ${MAX_TIMER}`,
  test: (value) => isWhole(value, least, MAX_TIMER),
})
const millisOrFalse: Check = {
  expected: `a whole number of milliseconds from 1 to ${MAX_TIMER}, or false`,
  test: (value) => value === false || isWhole(value, 1, MAX_TIMER),
}
const oneOf = (...values: string[]): Check => ({
  expected: `one of '${values.join("', '")}'`,
  test: (value) => values.includes(value as string),
})
const typed = (expected: string, ...types: string[]): Check => ({
  expected,
  test: (value) => types.includes(typeof value),
})
const object: Check = { expected: 'an object', test: isObject }
const objectOrFalse: Check = { expected: 'an object or false', test: (value) => value === false || isObject(value) }

const echo: Check = {
  expected: "true, false or 'debug'",
  test: (value) => [true, false, 'debug'].includes(value as Echo),
}

const isolation = oneOf('read uncommitted', 'read committed', 'repeatable read', 'serializable')
const boolean = typed('true or false', 'boolean')
const shared: Checks = {
  commitOn: oneOf('onSend', 'onResponse'),
  shouldCommit: typed('a function (request, reply) => boolean', 'function'),
  isolationLevel: isolation,
  readOnly: typed('true, false or a function (request) => boolean', 'boolean', 'function'),
  deferrable: boolean,
  statementTimeoutMillis: millisOrFalse,
}
export const routeChecks: Checks = { ...shared, autocommit: boolean, retry: objectOrFalse }
const sessionChecks: Checks = {
  isolationLevel: isolation,
  readOnly: boolean,
  deferrable: boolean,
  autocommit: boolean,
  statementTimeoutMillis: millisOrFalse,
  settings: object,
  name: typed('a string', 'string'),
  retry: objectOrFalse,
  signal: { expected: 'an AbortSignal', test: (value) => value instanceof AbortSignal },
  deadlineMillis: millis(1),
}
export const retryChecks: Checks = {
  attempts: whole(1),
  on: {
    expected: 'a list of codes, or a function (error) => boolean',
    test: (value) =>
      typeof value === 'function' || (Array.isArray(value) && value.every((code) => typeof code === 'string')),
  },
}
export const poolChecks: Checks = {
  size: whole(1),
  maxOverflow: whole(0),
  timeoutMillis: millis(0),
  maxWaiting: whole(0),
  recycleMillis: millisOrFalse,
  prePing: objectOrFalse,
}
export const pingChecks: Checks = { idleMillis: millis(0), timeoutMillis: millis(1) }
export const statementChecks: Checks = { cacheSize: whole(1) }
export const pluginChecks: Checks = {
  ...shared,
  connectionString: { expected: 'a connection string', test: (value) => typeof value === 'string' && value !== '' },
  connection: object,
  pool: object,
  decorator: { expected: 'a name', test: (value) => typeof value === 'string' && /^[A-Za-z_$][\w$]*$/.test(value) },
  settings: typed('a function (request) => ({ name: value })', 'function'),
  settleTimeoutMillis: millis(1),
  maxSessionMillis: millisOrFalse,
  closeGraceMillis: millis(0),
  resetOnReturn: oneOf('rollback', 'discard'),
  preparedStatements: objectOrFalse,
  pooler: oneOf('transaction'),
  plugins: { expected: 'an array of Kysely plugins', test: Array.isArray },
  echo,
  echoPool: echo,
  echoParameters: boolean,
  leakDetectionMillis: millisOrFalse,
  processes: whole(1),
  capacityCheck: boolean,
  serverTiming: boolean,
  asyncContext: boolean,
}
// Fastify hands its own options of `register` to the plugin too.
const FASTIFYS = new Set(['prefix', 'logLevel', 'logSerializers'])
// A value under one of these names may hold a password: a refusal says what kind of thing it got, not which.
const SECRET = new Set(['connectionString', 'connection'])

// Wherever it stands by mistake, a connection string is not repeated.
const isSecret = (text: string) => /:\/\/|password\s*=/i.test(text)

function show(name: string, value: unknown): string {
  if (typeof value === 'string' && isSecret(value)) return 'a connection string'
  if (value === null || value === undefined) return String(value)
  if (SECRET.has(name) || typeof value === 'object' || typeof value === 'function') {
    return value === '' ? 'an empty string' : Array.isArray(value) ? 'an array' : `a value of type ${typeof value}`
  }
  return typeof value === 'string' ? `'${value}'` : String(value)
}

/** Returns the options that are the object's own. */
function check<Options extends object>(given: Options, checks: Checks, path: string, ignored?: Set<string>): Options {
  if (!isObject(given))
    throw new InvalidOption(path === '' ? 'options' : path.slice(0, -1), 'an object', show('', given))
  const input = ownOptions(given, path)
  for (const name of Object.keys(input)) {
    const rule = Object.hasOwn(checks, name) ? checks[name] : undefined
    const value = (input as Record<string, unknown>)[name]
    if (rule === undefined) {
      if (ignored?.has(name)) continue
      const shown = isSecret(name) ? 'a connection string as a name' : name
      throw new InvalidOption(`${path}${shown}`, `one of ${Object.keys(checks).join(', ')}`, 'an unknown name')
    }
    // `{ readOnly: undefined }` leaves the option out, but DATABASE_URL forgotten must not connect to localhost.
    if (value === undefined && !SECRET.has(name)) continue
    if (!rule.test(value)) throw new InvalidOption(`${path}${name}`, rule.expected, show(name, value))
  }
  return input
}

function checkConnection(options: RequestDbOptions): ClientConfig {
  const { connectionString, connection: given } = options
  if ((connectionString === undefined) === (given === undefined)) {
    const got = given === undefined ? 'neither' : 'both'
    throw new InvalidOption('connectionString', 'a connection string here, or else the option connection', got)
  }
  // An `ssl` that is inherited would not be copied, and the password would go out in the clear.
  const connection = given && ownOptions(given, 'connection.')
  if (connection && Object.hasOwn(connection, '__proto__')) {
    // Written into JSON. pg makes a copy, which would get this prototype, and could take its `ssl` from there.
    throw new InvalidOption('connection.__proto__', 'an option of the object itself', 'a prototype')
  }
  if (connection?.query_timeout) {
    throw new InvalidOption(
      'connection.query_timeout',
      'statementTimeoutMillis in its place, which the server keeps',
      String(connection.query_timeout),
    )
  }
  return Object.freeze({
    keepAlive: true,
    fallback_application_name: 'fastify-request-db',
    ...connection,
    ...(connectionString && { connectionString }),
  })
}

/** With the connection out of sight: the pool is in every event, and whoever logs one should not log its password. */
function withHidden(value: ClientConfig, options: Omit<EffectivePoolOptions, 'connection'>): EffectivePoolOptions {
  const all: object = Object.defineProperty(options, 'connection', { value })
  return Object.freeze(all as EffectivePoolOptions)
}

/** Checks the options of `register`, fills in the defaults and freezes the result. @throws INVALID_OPTION */
export function checkOptions(given: RequestDbOptions): EffectiveOptions {
  const options = check(given, pluginChecks, '', FASTIFYS)
  const connection = checkConnection(options)
  const pool = check(options.pool ?? {}, poolChecks, 'pool.')
  const { pooler = false } = options
  if (pooler !== false) checkPooler(options, connection)
  const prePing = pooler === false && pool.prePing !== false && check(pool.prePing ?? {}, pingChecks, 'pool.prePing.')
  const preparedStatements =
    options.preparedStatements && check(options.preparedStatements, statementChecks, 'preparedStatements.')
  return Object.freeze({
    pool: withHidden(connection, {
      name: options.decorator ?? 'db',
      size: pool.size ?? 10,
      maxOverflow: pool.maxOverflow ?? 0,
      timeoutMillis: pool.timeoutMillis ?? 10_000,
      maxWaiting: pool.maxWaiting ?? 1000,
      recycleMillis: pool.recycleMillis === false ? Number.POSITIVE_INFINITY : (pool.recycleMillis ?? 1_800_000),
      prePing:
        prePing &&
        Object.freeze({ idleMillis: prePing.idleMillis ?? 1000, timeoutMillis: prePing.timeoutMillis ?? 500 }),
      settleTimeoutMillis: options.settleTimeoutMillis ?? 2000,
      closeGraceMillis: options.closeGraceMillis ?? 5000,
      resetOnReturn: options.resetOnReturn ?? 'rollback',
      preparedStatements: !!preparedStatements && Object.freeze({ cacheSize: preparedStatements.cacheSize ?? 100 }),
      pooler,
      leakDetectionMillis: options.leakDetectionMillis ?? false,
      processes: options.processes,
      capacityCheck: options.capacityCheck ?? true,
    }),
    route: mergeRoute(ROUTE_DEFAULTS, options),
    settings: options.settings,
    maxSessionMillis: options.maxSessionMillis ?? false,
    plugins: Object.freeze([...(options.plugins ?? [])]),
    echo: options.echo ?? false,
    echoPool: options.echoPool ?? false,
    echoParameters: options.echoParameters ?? false,
    serverTiming: options.serverTiming ?? false,
    asyncContext: options.asyncContext ?? false,
  })
}

const ROUTE_DEFAULTS: EffectiveRouteOptions = Object.freeze({
  commitOn: 'onSend',
  shouldCommit: undefined,
  isolationLevel: undefined,
  readOnly: false,
  deferrable: false,
  autocommit: false,
  statementTimeoutMillis: false,
  retry: undefined,
})

const REPEATABLE = ['40001', '40P01', 'CONNECTION_LOST']

function checkRetry(retry: RouteDbOptions['retry'], path: string): EffectiveRetry | undefined {
  if (!retry) return undefined
  const { attempts, on } = check(retry, retryChecks, `${path}retry.`)
  return Object.freeze({ attempts: attempts ?? 3, on: on ?? REPEATABLE })
}

function mergeRoute(base: EffectiveRouteOptions, over: RouteDbOptions, path = ''): EffectiveRouteOptions {
  const retry = checkRetry(over.retry, path)
  // What its statements have done by themselves cannot be undone.
  if (retry && (over.autocommit ?? base.autocommit)) {
    throw new InvalidOption(`${path}retry`, 'a session with transactions', 'autocommit: true')
  }
  return Object.freeze({
    commitOn: over.commitOn ?? base.commitOn,
    shouldCommit: over.shouldCommit ?? base.shouldCommit,
    isolationLevel: over.isolationLevel ?? base.isolationLevel,
    readOnly: over.readOnly ?? base.readOnly,
    deferrable: over.deferrable ?? base.deferrable,
    autocommit: over.autocommit ?? base.autocommit,
    statementTimeoutMillis: over.statementTimeoutMillis ?? base.statementTimeoutMillis,
    retry,
  })
}

/** Checks a route's `config.db` and lays it over the plugin's options. @throws INVALID_OPTION */
export function checkRouteOptions(base: EffectiveRouteOptions, route: unknown, path: string): EffectiveRouteOptions {
  if (route === undefined) return base
  return mergeRoute(base, check(route as RouteDbOptions, routeChecks, `${path}.`), `${path}.`)
}

/** What a session outside of a request goes by. */
export interface CheckedSession {
  readonly route: EffectiveRouteOptions
  readonly options: SessionOptions
}

/** Checks the options of `fastify.db.session(options, fn)`. @throws INVALID_OPTION */
export function checkSessionOptions(base: EffectiveRouteOptions, given: SessionOptions): CheckedSession {
  const options = check(given, sessionChecks, 'session.')
  // A plugin-wide rule that needs a request cannot decide for a session without one.
  const plain = typeof base.readOnly === 'function' ? { ...base, readOnly: false } : base
  return { route: mergeRoute(plain, options, 'session.'), options }
}
