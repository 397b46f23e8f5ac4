import type { Capacity } from './capacity.ts'
import type { HolderSnapshot, Snapshot } from './snapshot.ts'

/** What a route did with its connections of late. */
export interface RouteUse {
  readonly method: string
  readonly route: string
  /** How often it gave one back. */
  readonly count: number
  readonly heldMillis: number
  readonly busyMillis: number
  readonly statements: number
}

/** What came back of late. */
export interface Lately {
  readonly routes: readonly RouteUse[]
  readonly refused: number
  /** The time all of this is of. */
  readonly millis: number
  /** The longest that a session of each route held a connection and gave it back, where that was long. */
  readonly longestMillis: ReadonlyMap<string, number>
}

/** A backend that is of interest, as the server sees it. */
export interface BackendView {
  readonly pid: number
  readonly state: string
  readonly applicationName: string
  readonly userName: string
  readonly query: string
  /** How long it has been in its state. */
  readonly stateMillis: number
  readonly isWaitingForLock: boolean
  readonly blockedBy: readonly number[]
}

/** What the server said when it was asked over a connection outside of the pool, or that it did not. */
export interface ServerView {
  readonly backends: readonly BackendView[]
  readonly error: Error | undefined
}
export interface AgedView extends ServerView {
  /** Who held the connections then. */
  readonly holders: readonly HolderSnapshot[]
  /** Since it was asked. What has begun later, the view knows nothing of. */
  readonly agoMillis: number
}

/** All that a verdict is made from. Durations in milliseconds. */
export interface Facts {
  readonly code: string | undefined
  readonly snapshot: Snapshot
  readonly timeoutMillis: number
  /** What stands between the pool and PostgreSQL. */
  readonly pooler: 'transaction' | false
  readonly leakDetectionMillis: number | false
  readonly processes: number
  /** How long each connection that is being opened or pinged has been so. */
  readonly connecting: readonly number[]
  /** What the connection could not be opened with, or was lost with, for which the report is made. */
  readonly cause: Error | undefined
  /** The last attempt to open one, if it failed, and how long ago. */
  readonly failedConnect: { readonly error: Error; readonly agoMillis: number } | undefined
  readonly recent: Lately
  readonly server: AgedView | undefined
  /** Since the server last answered anything on a connection of the pool. */
  readonly answeredMillis: number
  /** Backends held by requests of which it is known which other sessions they open. */
  readonly followed: ReadonlySet<number>
  readonly capacity: Capacity | undefined
}
