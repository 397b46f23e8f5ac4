/** Whose session it is, for snapshots, logs and errors. */
export interface Who {
  /** HTTP method; empty outside a request. */
  readonly method: string
  /** The route's pattern such as `/trips/:id`, never the URL; the session's name outside a request. */
  readonly route: string
  /** Fastify's `request.id`; empty outside a request. */
  readonly requestId: string
}

/** A session with a connection, as `snapshot()` shows it. Durations in milliseconds. */
export interface HolderSnapshot extends Who {
  /** Process id of the PostgreSQL backend, as in `pg_stat_activity`; with `pooler` a number of PgBouncer's own. */
  readonly pid: number
  /** Since its check-out. */
  readonly heldMillis: number
  /** Of `heldMillis`, waiting for the server. */
  readonly busyMillis: number
  /** Of `heldMillis`, the server waiting for the app. */
  readonly idleMillis: number
  /** Now: a statement is under way, or the server waits for the app. */
  readonly state: 'busy' | 'idle'
  /** How long it has been in `state`. */
  readonly stateMillis: number
  /** How many it has sent. */
  readonly statements: number
  /** SQL text without its parameters. */
  readonly lastStatement: string | undefined
  /** Whether a transaction is open on the server. */
  readonly inTransaction: boolean
  /** The request in which `fastify.db.session(fn)` was called, where that is known. */
  readonly openedBy?: Who
  /** Time since the response of its request was sent. */
  readonly answeredMillis?: number
  /** Where the app asked for the connection, as a stack; only while somebody looks for leaks or double use. */
  readonly callSite?: string
}

/** A session that waits for a connection, in the queue or for one that is being opened or pinged. */
export interface WaiterSnapshot extends Who {
  /** Since it asked. */
  readonly waitedMillis: number
  /** The request in which `fastify.db.session(fn)` was called, where that is known. */
  readonly openedBy?: Who
  /** The backends its request holds already. */
  readonly holds: readonly number[]
  /** Where the app asked for the connection, as a stack; only while somebody looks for leaks or double use. */
  readonly callSite?: string
}

/** Counts since the pool was made. */
export interface Totals {
  /** Connections given to sessions. */
  checkouts: number
  /** Of `checkouts`, on a connection whose last session still waited for the answer to its COMMIT or ROLLBACK. */
  handOvers: number
  /** Refused after `pool.timeoutMillis`. */
  timeouts: number
  /** Refused because `pool.maxWaiting` was reached. */
  saturated: number
  /** Connections opened, and attempts that failed. */
  opened: number
  /** Of `opened`, those that failed. */
  failedConnects: number
  /** Connections closed in good order: overflow, shutdown. */
  closed: number
  /** Closed for their age. */
  recycled: number
  /** Destroyed because they were dead, dirty or suspect. */
  invalidated: number
  /** Idle connections that did not answer the ping. */
  failedPings: number
  /** Statements cancelled on the server. */
  cancels: number
  /** First flights sent once more on another connection. */
  replays: number
  /** Transactions committed. */
  commits: number
  /** Transactions rolled back. */
  rollbacks: number
  /** COMMITs refused, or lost with their connection. */
  failedCommits: number
}

/** The pool at one moment. SQLAlchemy: `pool.status()`. Plain data, a copy, safe to log. */
export interface Snapshot {
  /** The registration's `decorator`. */
  readonly name: string
  /** `pool.size`. */
  readonly size: number
  /** `pool.maxOverflow`. */
  readonly maxOverflow: number
  /** Connections open now: `checkedOut`, `idle`, and those that are being pinged. */
  readonly open: number
  /** Connections that nobody uses. */
  readonly idle: number
  /** Connections that sessions hold. */
  readonly checkedOut: number
  /** How many of the open ones are beyond `size`. */
  readonly overflow: number
  /** Sessions in the queue. */
  readonly waiting: number
  /** Who holds the connections. */
  readonly holders: readonly HolderSnapshot[]
  /** Who waits for one. */
  readonly waiters: readonly WaiterSnapshot[]
  /** Counts since the pool was made. */
  readonly totals: Readonly<Totals>
}

/** The pool an event is of: the same object as `fastify.db.pool`. */
export interface ObservedPool {
  /** The registration's `decorator`. */
  readonly name: string
  /** As `fastify.db.snapshot()`. */
  snapshot(): Snapshot
}
