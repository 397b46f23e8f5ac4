import type { Verdict } from './verdict.ts'

/** Sessions of one route, of those that hold a connection. Durations in milliseconds. */
export interface HolderGroup {
  readonly method: string
  readonly route: string
  readonly count: number
  /** Of the one that has held its connection longest: */
  readonly oldestMillis: number
  readonly busyMillis: number
  readonly idleMillis: number
  readonly lastStatement: string | undefined
  /** How many of them have a statement under way now. */
  readonly busy: number
  readonly callSite: string | undefined
}

/** Sessions of one route, of those that wait. */
export interface WaiterGroup {
  readonly method: string
  readonly route: string
  readonly count: number
  readonly oldestMillis: number
}

/** Who holds the connections, who waits, and why there are none. Plain data. It names routes and SQL: not for clients. */
export interface Report {
  /** ISO 8601. */
  readonly at: string
  readonly pool: string
  /** Of the error it was made for; undefined for a session that still waits. */
  readonly code: string | undefined
  readonly size: number
  readonly maxOverflow: number
  readonly timeoutMillis: number
  readonly open: number
  readonly idle: number
  readonly checkedOut: number
  readonly waiting: number
  /** By route, the largest group first. */
  readonly holders: readonly HolderGroup[]
  readonly waiters: readonly WaiterGroup[]
  /** Undefined where there is nothing to be changed: POOL_CLOSED. */
  readonly verdict: Verdict | undefined
}
