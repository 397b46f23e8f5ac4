import type { BackendView, Facts, Lately, RouteUse } from '../../lib/observe/facts.ts'
import type { HolderSnapshot, Snapshot, Totals, WaiterSnapshot } from '../../lib/observe/snapshot.ts'

const TOTALS = {} as Totals
let pids = 0
let requests = 0

/** A request that holds a connection: by default for 100 ms, all of them idle. */
export function holder(route: string, more: Partial<HolderSnapshot> = {}): HolderSnapshot {
  const heldMillis = more.heldMillis ?? 100
  const busyMillis = more.busyMillis ?? 0
  return {
    method: 'GET',
    route,
    requestId: `req-${++requests}`,
    pid: ++pids,
    heldMillis,
    busyMillis,
    idleMillis: heldMillis - busyMillis,
    state: 'idle',
    stateMillis: heldMillis - busyMillis,
    statements: 1,
    lastStatement: 'select 1',
    inTransaction: true,
    ...more,
  }
}

export const waiter = (route: string, more: Partial<WaiterSnapshot> = {}): WaiterSnapshot => ({
  method: 'GET',
  route,
  requestId: `req-${++requests}`,
  waitedMillis: 1000,
  holds: [],
  ...more,
})

/** What a route has done of late. */
export const use = (route: string, count: number, heldMillis: number, busyMillis: number): RouteUse => ({
  method: 'GET',
  route,
  count,
  heldMillis: count * heldMillis,
  busyMillis: count * busyMillis,
  statements: count,
})

export const lately = (routes: RouteUse[] = [], refused = 3, longest: Record<string, number> = {}): Lately => ({
  routes,
  refused,
  millis: 10_000,
  longestMillis: new Map(Object.entries(longest)),
})

/** A backend as the server sees it. */
export const backend = (pid: number, blockedBy: number[] = [], more: Partial<BackendView> = {}): BackendView => ({
  pid,
  state: blockedBy.length > 0 ? 'active' : 'idle in transaction',
  applicationName: 'psql',
  userName: 'ops',
  query: 'lock table trips',
  stateMillis: 5000,
  isWaitingForLock: blockedBy.length > 0,
  blockedBy,
  ...more,
})

/** What is known when somebody is refused by a pool of 4 after a second. */
export function facts(
  pool: { holders?: HolderSnapshot[]; waiters?: WaiterSnapshot[]; open?: number } = {},
  more: Partial<Facts> = {},
): Facts {
  const { holders = [], waiters = [waiter('/victim')], open = 4 } = pool
  const snapshot: Snapshot = {
    name: 'db',
    size: 4,
    maxOverflow: 0,
    open,
    idle: open - holders.length,
    checkedOut: holders.length,
    overflow: 0,
    waiting: waiters.length,
    holders,
    waiters,
    totals: TOTALS,
  }
  return {
    code: 'FST_REQUEST_DB_POOL_TIMEOUT',
    snapshot,
    timeoutMillis: 1000,
    pooler: false,
    leakDetectionMillis: false,
    processes: 1,
    connecting: [],
    cause: undefined,
    failedConnect: undefined,
    recent: lately(),
    server: undefined,
    answeredMillis: 0,
    followed: new Set(),
    capacity: undefined,
    ...more,
  }
}
