import type { Verdict } from './cause.ts'
import type { Facts } from './facts.ts'
import type { HolderSnapshot, Who } from './snapshot.ts'
import { diagnose } from './verdict.ts'
import { labelOf, seconds } from './words.ts'

/** Sessions of one route, of those that hold a connection. Durations in milliseconds. */
export interface HolderGroup {
  /** HTTP method; empty outside a request. */
  readonly method: string
  /** The route's pattern, or the session's name. */
  readonly route: string
  /** How many of them there are. */
  readonly count: number
  /** Of the one that has held its connection longest: */
  readonly oldestMillis: number
  /** Of `oldestMillis`, waiting for the server. */
  readonly busyMillis: number
  /** Of `oldestMillis`, the server waiting for the app. */
  readonly idleMillis: number
  /** Its SQL text without parameters. */
  readonly lastStatement: string | undefined
  /** How many of them have a statement under way now. */
  readonly busy: number
  /** Where it asked for its connection, as a stack, where that is known. */
  readonly callSite: string | undefined
}

/** Sessions of one route, of those that wait. */
export interface WaiterGroup {
  /** HTTP method; empty outside a request. */
  readonly method: string
  /** The route's pattern, or the session's name. */
  readonly route: string
  /** How many of them there are. */
  readonly count: number
  /** How long the first of them has waited. */
  readonly oldestMillis: number
}

/** Who holds the connections, who waits, and why there are none. Plain data. It names routes and SQL: not for clients. */
export interface Report {
  /** ISO 8601. */
  readonly at: string
  /** The registration's `decorator`. */
  readonly pool: string
  /** Of the error it was made for; undefined for a session that still waits. */
  readonly code: string | undefined
  /** `pool.size`. */
  readonly size: number
  /** `pool.maxOverflow`. */
  readonly maxOverflow: number
  /** `pool.timeoutMillis`. */
  readonly timeoutMillis: number
  /** Connections open at that moment. */
  readonly open: number
  /** Connections that nobody used. */
  readonly idle: number
  /** Connections that sessions held. */
  readonly checkedOut: number
  /** Sessions in the queue. */
  readonly waiting: number
  /** By route, the largest group first. */
  readonly holders: readonly HolderGroup[]
  /** By route, the largest group first. */
  readonly waiters: readonly WaiterGroup[]
  /** Undefined where there is nothing to be changed: POOL_CLOSED. */
  readonly verdict: Verdict | undefined
}

/** The facts as a person wants to read them, and what is to be made of them. */
export function makeReport(facts: Facts): Report {
  const { name, size, maxOverflow, open, idle, checkedOut, waiting, holders, waiters } = facts.snapshot
  return {
    at: new Date().toISOString(),
    pool: name,
    code: facts.code,
    size,
    maxOverflow,
    timeoutMillis: facts.timeoutMillis,
    open,
    idle,
    checkedOut,
    waiting,
    holders: byRoute(holders).map(holderGroup),
    waiters: byRoute(waiters).map(({ method, route, all }) => ({
      method,
      route,
      count: all.length,
      oldestMillis: round(Math.max(...all.map(({ waitedMillis }) => waitedMillis))),
    })),
    verdict: diagnose(facts),
  }
}

interface Group<T> {
  readonly method: string
  readonly route: string
  readonly all: T[]
}

function byRoute<T extends Who & { openedBy?: Who }>(sessions: readonly T[]): Group<T>[] {
  const groups = new Map<string, Group<T>>()
  for (const session of sessions) {
    const { method, route } = session.openedBy ?? session
    const key = `${method} ${route}`
    const group = groups.get(key) ?? { method, route, all: [] }
    group.all.push(session)
    groups.set(key, group)
  }
  return [...groups.values()].sort((a, b) => b.all.length - a.all.length)
}

function holderGroup({ method, route, all }: Group<HolderSnapshot>): HolderGroup {
  const oldest = all.reduce((one, other) => (other.heldMillis > one.heldMillis ? other : one))
  return {
    method,
    route,
    count: all.length,
    oldestMillis: round(oldest.heldMillis),
    busyMillis: round(oldest.busyMillis),
    idleMillis: round(oldest.idleMillis),
    lastStatement: oldest.lastStatement,
    busy: all.filter(({ state }) => state === 'busy').length,
    callSite: oldest.callSite,
  }
}

const round = (millis: number) => Math.round(millis * 10) / 10
const MOST_GROUPS = 5
const MOST_TEXT = 100

/** The report in one line. */
export function sentenceOf(report: Report): string {
  const { pool, size, maxOverflow, waiting, holders, verdict } = report
  const held = holders.slice(0, MOST_GROUPS).map((group) => {
    const last = group.lastStatement === undefined ? '' : `, last: ${shorten(group.lastStatement)}`
    const times = `oldest ${seconds(group.oldestMillis)}, of which idle ${seconds(group.idleMillis)}`
    return `${labelOf(group)} x${group.count} (${times}${last})`
  })
  const more = holders.length > MOST_GROUPS ? ` and ${holders.length - MOST_GROUPS} more` : ''
  const by = held.length > 0 ? `held by ${held.join(', ')}${more}` : 'held by nobody'
  const why = verdict === undefined ? 'the server is shutting down' : `verdict ${verdict.cause}: ${verdict.sentence}`
  const name = `pool "${pool}" of size ${size} overflow ${maxOverflow}`
  const what =
    report.code === 'FST_REQUEST_DB_CONNECTION_LOST' ? `${name} lost a connection` : `no connection from ${name}`
  return `request-db: ${what}: ${waiting} waiting; ${by}; ${why}`
}

function shorten(text: string): string {
  const line = text.replace(/\s+/g, ' ').trim()
  return line.length > MOST_TEXT ? `${line.slice(0, MOST_TEXT / 2)} … ${line.slice(-MOST_TEXT / 2)}` : line
}
