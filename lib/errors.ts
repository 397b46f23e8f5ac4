import createError, { type FastifyError } from '@fastify/error'
import type { Report } from './observe/report.ts'

/** An error of this plugin: a Fastify error that also says whether trying again can help. */
export interface RequestDbError extends FastifyError {
  /** True when the same request may succeed a moment later and repeating it can do no harm. */
  readonly retryable: boolean
  /** Headers Fastify's default error handler sends along, such as `retry-after`. */
  headers?: Record<string, string>
  /** Who holds the connections, who waits, and why there was none. Of every error with status 503; not enumerable, since it is not for clients. */
  readonly report?: Report
}

type Constructor<Arg extends unknown[]> = new (...args: [...Arg, { cause?: unknown }?]) => RequestDbError

function define<Arg extends unknown[]>(name: string, statusCode: number, retryable: boolean, message: string) {
  const Base = createError<string, number, unknown[]>(`FST_REQUEST_DB_${name}`, message, statusCode)
  Object.defineProperty(Base.prototype, 'retryable', { value: retryable, enumerable: true })
  return Base as unknown as Constructor<Arg>
}

// The texts can reach a client: no host, user, password, route or SQL in them. Those are in `cause` and in the log.

/** Nobody gave a connection back in time. SQLAlchemy: `TimeoutError` of QueuePool, whose words these are. */
export const PoolTimeout = define<[size: number, overflow: number, seconds: string, pool: string]>(
  'POOL_TIMEOUT',
  503,
  true,
  'Pool limit of size %s overflow %s reached, connection timed out, timeout %s s (pool "%s"): ' +
    'give connections back sooner, or raise pool.size or pool.maxOverflow',
)

/** More sessions than `pool.maxWaiting` wait already, so this one is refused at once. */
export const PoolSaturated = define<[size: number, overflow: number, waiting: number, pool: string]>(
  'POOL_SATURATED',
  503,
  true,
  'Pool limit of size %s overflow %s reached, and %s sessions are waiting already (pool "%s"): ' +
    'try again later, or raise pool.maxWaiting',
)

/** The server is shutting down: nobody gets a connection any more. */
export const PoolClosed = define<[pool: string]>(
  'POOL_CLOSED',
  503,
  true,
  'The pool "%s" is closed because the server is shutting down: try again on another one',
)

/** No connection could be opened: refused, DNS, starting up, too many connections, wrong password. */
export const Unavailable = define<[pool: string]>(
  'UNAVAILABLE',
  503,
  true,
  'The pool "%s" cannot open a connection to the database: the reason is in the log and in error.cause',
)

/** The connection died before COMMIT was sent, so nothing since the last commit was kept. */
export const ConnectionLost = define<[pool: string]>(
  'CONNECTION_LOST',
  503,
  true,
  'The connection to the database was lost (pool "%s"): everything since the last commit is rolled back, try again',
)

/** The connection died, or stayed silent, after COMMIT was sent. */
export const CommitUnknown = define<[pool: string]>(
  'COMMIT_UNKNOWN',
  500,
  false,
  'The connection to the database was lost while COMMIT was under way (pool "%s"): ' +
    'the changes may or may not have been kept, look before you repeat the request',
)

/** What the handler took for success cannot be committed. pgx: `ErrTxCommitRollback`. */
export const TransactionAborted = define<[pool: string, why: string]>(
  'TRANSACTION_ABORTED',
  500,
  false,
  'Nothing was committed (pool "%s"): %s',
)

/** The session was used after its end. pgx: `ErrTxClosed`. */
export const SessionEnded = define<[pool: string, why: string]>(
  'SESSION_ENDED',
  500,
  false,
  'This database session has ended (pool "%s"): %s',
)

/** The last attempt of a route or job with `retry` has failed like those before it. `cause` is what it failed with. */
export const RetriesExhausted = define<[attempts: number, pool: string]>(
  'RETRIES_EXHAUSTED',
  503,
  true,
  'None of %s attempts succeeded (pool "%s"): nothing was kept, try again later',
)

/** `currentSession()` where there is none. Flask-SQLAlchemy: "Working outside of application context". */
export const NoSession = define<[pool: string, why: string]>(
  'NO_SESSION',
  500,
  false,
  'currentSession() finds no session (pool "%s"): %s',
)

/** Two pieces of code use one session in ways that exclude each other. SQLAlchemy: error code `isce`. */
export const NestedConflict = define<[why: string]>('NESTED_CONFLICT', 500, false, '%s')

/** A plugin or route option is unknown or impossible. */
export const InvalidOption = define<[option: string, expected: string, got: string]>(
  'INVALID_OPTION',
  500,
  false,
  'Option %s: expected %s, got %s',
)

/** The name a registration would take is taken. */
export const AlreadyRegistered = define<[name: string]>(
  'ALREADY_REGISTERED',
  500,
  false,
  'The name "%s" is taken on this Fastify instance: register a second database with another `decorator`',
)

// PostgreSQL aborted an innocent transaction: serialization_failure, deadlock_detected.
const REPEATABLE = new Set(['40001', '40P01'])

/**
 * A statement the plugin itself sent at the end of a session failed: COMMIT, or a deferred write.
 * `code` is PostgreSQL's SQLSTATE, `cause` is pg's error.
 */
export class SettleFailed extends Error implements RequestDbError {
  override readonly name = 'FastifyError'
  readonly statusCode: number
  readonly code: string
  readonly retryable: boolean

  constructor(what: string, pool: string, cause: Error & Partial<RequestDbError>, consequence = 'nothing was kept') {
    const code = sqlStateOf(cause) ?? 'FST_REQUEST_DB_TRANSACTION_ABORTED'
    super(`${what} failed with ${code} (pool "${pool}"): ${consequence}`, { cause })
    this.code = code
    this.statusCode = cause.statusCode ?? 500
    this.retryable = cause.retryable ?? REPEATABLE.has(code)
  }
}

/** The five characters PostgreSQL names an error by, if `error` comes from PostgreSQL. */
export function sqlStateOf(error: unknown): string | undefined {
  const { code, severity } = (error ?? {}) as { code?: unknown; severity?: unknown }
  return typeof severity === 'string' && typeof code === 'string' ? code : undefined
}
