import type { HolderSnapshot, Totals, WaiterSnapshot, Who } from '../observe/snapshot.ts'
import { now } from './queue.ts'

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
