import type { FastifyReply, FastifyRequest } from 'fastify'
import type { KyselyPlugin } from 'kysely'
import type { ClientConfig } from 'pg'
import type { Pooler } from './pooler.ts'

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
