import { now } from './queue.ts'

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
  readonly statements: number
  /** SQL text without its parameters. */
  readonly lastStatement: string | undefined
  readonly inTransaction: boolean
}

/** A session that waits for a connection, in the queue or for one that is being opened or pinged. */
export interface WaiterSnapshot extends Who {
  readonly waitedMillis: number
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

/** One session's time with a connection. The session reports to it what it does there. */
export class Holding {
  readonly who: Who
  readonly pid: number
  readonly #since = now()
  #busySince = 0
  #busyMillis = 0
  #statements = 0
  #lastStatement: string | undefined
  inTransaction = false

  constructor(who: Who, pid: number) {
    this.who = who
    this.pid = pid
  }

  /** `statements` of the app leave for the server. */
  busy(statements: number, last: string): void {
    if (this.#busySince === 0) this.#busySince = now()
    this.#statements += statements
    if (statements > 0) this.#lastStatement = last
  }

  /** `statements` were not run after all, and will be sent again. */
  again(statements: number): void {
    this.#statements -= statements
  }

  /** The server has answered all. */
  idle(): void {
    if (this.#busySince === 0) return
    this.#busyMillis += now() - this.#busySince
    this.#busySince = 0
  }

  snapshot(at: number): HolderSnapshot {
    const heldMillis = at - this.#since
    const busyMillis = this.#busyMillis + (this.#busySince === 0 ? 0 : at - this.#busySince)
    return {
      ...this.who,
      pid: this.pid,
      heldMillis,
      busyMillis,
      idleMillis: Math.max(0, heldMillis - busyMillis),
      statements: this.#statements,
      lastStatement: this.#lastStatement,
      inTransaction: this.inTransaction,
    }
  }
}

/** Who holds what since when, who waits, and the counts. */
export class Ledger {
  readonly holdings = new Set<Holding>()
  readonly #waiters = new Map<object, { who: Who; since: number }>()
  readonly totals: Totals = {
    checkouts: 0,
    handOvers: 0,
    timeouts: 0,
    saturated: 0,
    opened: 0,
    failedConnects: 0,
    closed: 0,
    recycled: 0,
    invalidated: 0,
    failedPings: 0,
    cancels: 0,
    replays: 0,
    commits: 0,
    rollbacks: 0,
    failedCommits: 0,
  }
  // The usual time between two check-ins, for Retry-After: a moving average over about ten.
  #gapMillis = 0
  #lastCheckIn = 0

  waits(key: object, who: Who): void {
    this.#waiters.set(key, { who, since: now() })
  }

  waitsNoMore(key: object): void {
    this.#waiters.delete(key)
  }

  checkedOut(who: Who, pid: number): Holding {
    const holding = new Holding(who, pid)
    this.holdings.add(holding)
    this.totals.checkouts++
    return holding
  }

  checkedIn(holding: Holding): void {
    this.holdings.delete(holding)
    const at = now()
    if (this.#lastCheckIn !== 0) {
      const gap = at - this.#lastCheckIn
      this.#gapMillis = this.#gapMillis === 0 ? gap : this.#gapMillis * 0.9 + gap * 0.1
    }
    this.#lastCheckIn = at
  }

  /** Seconds until the queue of `waiting` has probably been served, from 1 to 60. */
  retryAfterSeconds(waiting: number): number {
    return Math.min(60, Math.max(1, Math.ceil((waiting * this.#gapMillis) / 1000)))
  }

  holders(): HolderSnapshot[] {
    const at = now()
    return Array.from(this.holdings, (holding) => holding.snapshot(at))
  }

  waiters(): WaiterSnapshot[] {
    const at = now()
    return Array.from(this.#waiters.values(), ({ who, since }) => ({ ...who, waitedMillis: at - since }))
  }
}
