import type { ClientConfig } from 'pg'
import { InvalidOption } from './errors.ts'
import type {
  Echo,
  EffectiveOptions,
  EffectivePoolOptions,
  EffectiveRetry,
  EffectiveRouteOptions,
  RequestDbOptions,
  RouteDbOptions,
  SessionOptions,
} from './options.ts'
import { ownOptions } from './own-options.ts'
import { checkPooler } from './pooler.ts'

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
