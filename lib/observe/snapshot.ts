/** Whose session it is, for snapshots, logs and errors. */
export interface Who {
  /** HTTP method; empty outside a request. */
  readonly method: string
  /** The route's pattern such as `/trips/:id`, never the URL; the session's name outside a request. */
  readonly route: string
  readonly requestId: string
}

/** A session with a connection, as `snapshot()` shows it. Durations in milliseconds. */
export interface HolderSnapshot extends Who {
  /** Process id of the PostgreSQL backend, as in `pg_stat_activity`. */
  readonly pid: number
  readonly heldMillis: number
  /** Of `heldMillis`, waiting for the server. */
  readonly busyMillis: number
  /** Of `heldMillis`, the server waiting for the app. */
  readonly idleMillis: number
  /** Now: a statement is under way, or the server waits for the app. */
  readonly state: 'busy' | 'idle'
  /** How long it has been in `state`. */
  readonly stateMillis: number
  readonly statements: number
  /** SQL text without its parameters. */
  readonly lastStatement: string | undefined
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
  readonly waitedMillis: number
  readonly openedBy?: Who
  /** The backends its request holds already. */
  readonly holds: readonly number[]
  readonly callSite?: string
}

/** Counts since the pool was made. */
export interface Totals {
  checkouts: number
  /** Of `checkouts`, on a connection whose last session still waited for the answer to its COMMIT or ROLLBACK. */
  handOvers: number
  /** Refused after `pool.timeoutMillis`. */
  timeouts: number
  /** Refused because `pool.maxWaiting` was reached. */
  saturated: number
  /** Connections opened, and attempts that failed. */
  opened: number
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
  commits: number
  rollbacks: number
  failedCommits: number
}

/** The pool at one moment. SQLAlchemy: `pool.status()`. Plain data, a copy, safe to log. */
export interface Snapshot {
  /** The registration's `decorator`. */
  readonly name: string
  readonly size: number
  readonly maxOverflow: number
  /** Connections open now: `checkedOut`, `idle`, and those that are being pinged. */
  readonly open: number
  readonly idle: number
  readonly checkedOut: number
  /** How many of the open ones are beyond `size`. */
  readonly overflow: number
  /** Sessions in the queue. */
  readonly waiting: number
  readonly holders: readonly HolderSnapshot[]
  readonly waiters: readonly WaiterSnapshot[]
  readonly totals: Readonly<Totals>
}

/** The pool an event is of: the same object as `fastify.db.pool`. */
export interface ObservedPool {
  readonly name: string
  snapshot(): Snapshot
}
