import type { BackendView, Facts, RouteUse } from './facts.ts'
import { serversFor } from './queueing.ts'
import type { HolderSnapshot, Who } from './snapshot.ts'
import { isServerFull, reasonOf } from './unreachable.ts'

/** Why there was no connection, in the order in which they are looked for: the first that fits is the verdict. */
export type Cause =
  | 'unreachable'
  | 'server-full'
  | 'hold-and-wait'
  | 'leak'
  | 'lock-wait'
  | 'slow-sql'
  | 'held-idle'
  | 'pool-too-small'

/** What is wrong and what to change. */
export interface Verdict {
  readonly cause: Cause
  /** For a person: what happened, and what to do about it. */
  readonly sentence: string
  /** The guilty ones, worst first, such as `GET /report`; empty where none is. */
  readonly routes: readonly string[]
  /** The figures it rests on. */
  readonly evidence: Readonly<Record<string, unknown>>
}

// So many of the connections have to be leaked, or to wait for locks, for that to be the cause.
const SHARE = 1 / 4
// A response may be on its way out while its session settles.
const ANSWERED_MILLIS = 50
// What a connection waits between statements in any case: the event loop.
const IDLE_MILLIS = 10

export const labelOf = ({ method, route }: { method: string; route: string }): string => `${method} ${route}`.trim()
export const seconds = (millis: number): string =>
  millis < 1000 ? `${Math.round(millis)} ms` : `${(millis / 1000).toFixed(1)} s`

/** The first cause that fits; undefined where nothing is to be changed. */
export function diagnose(facts: Facts): Verdict | undefined {
  if (facts.code === 'FST_REQUEST_DB_POOL_CLOSED') return undefined
  for (const look of [lookAtServer, holdAndWait, leak, lockWait, slowSql, heldIdle]) {
    const verdict = look(facts)
    if (verdict !== undefined) return verdict
  }
  return poolTooSmall(facts)
}

const capacityOf = ({ snapshot }: Facts) => snapshot.size + snapshot.maxOverflow
const ownerOf = (session: Who & { openedBy?: Who }) => labelOf(session.openedBy ?? session)
const many = (count: number, what: string) => `${count} ${what}${count === 1 ? '' : 's'}`

/** Labels, the most frequent first. */
function ranked(labels: readonly string[]): string[] {
  const counts = new Map<string, number>()
  for (const label of labels) counts.set(label, (counts.get(label) ?? 0) + 1)
  return Array.from(counts)
    .sort(([, a], [, b]) => b - a)
    .map(([label]) => label)
}

/** Refused, silent, full: before anything else, since nobody's use of the pool can be blamed. */
function lookAtServer(facts: Facts): Verdict | undefined {
  const { snapshot, failedConnect, server, timeoutMillis } = facts
  const isGrowing = snapshot.open < capacityOf(facts)
  const recentFailure =
    failedConnect && isGrowing && failedConnect.agoMillis <= 2 * timeoutMillis ? failedConnect.error : undefined
  const slow = facts.connecting.filter((millis) => millis >= Math.min(1000, timeoutMillis / 2)).length
  const isStuck = slow > 0 && slow >= capacityOf(facts) - snapshot.checkedOut
  const isSilent = isStuck && isGrowing ? new Error('The server does not answer') : undefined
  const error = facts.cause ?? recentFailure ?? server?.error ?? isSilent
  if (error === undefined) return undefined
  if (isServerFull(error)) return serverFull(facts, error)
  const { kind, sentence } = reasonOf(error)
  const { code } = error as { code?: string }
  // PostgreSQL names the user there.
  const text = kind === 'credentials' ? undefined : error.message
  return { cause: 'unreachable', sentence, routes: [], evidence: { kind, code, error: text } }
}

function serverFull({ snapshot, capacity, processes }: Facts, error: Error): Verdict {
  const max = capacity?.maxConnections
  const usable = capacity && capacity.maxConnections - capacity.reserved
  const others = usable === undefined ? undefined : Math.max(0, usable - snapshot.open)
  const who =
    others === undefined
      ? 'other clients hold all that this pool does not'
      : `of its ${usable} usable ones (max_connections ${max}) others hold about ${others}`
  const sentence =
    `PostgreSQL has no connection left (53300): this pool has ${snapshot.open} open, ${who}. Find out who in ` +
    `pg_stat_activity; lower pool.size of all processes, raise max_connections, or put PgBouncer in between`
  const evidence = { open: snapshot.open, maxConnections: max, heldByOthers: others, processes, error: error.message }
  return { cause: 'server-full', sentence, routes: [], evidence }
}

/** A request that holds a connection waits for a second one. */
function holdAndWait(facts: Facts): Verdict | undefined {
  const { holders, waiters } = facts.snapshot
  const second = waiters.filter(({ holds }) => holds.length > 0)
  if (second.length === 0) return jam(facts)
  const routes = ranked(second.map(ownerOf))
  const [first] = second
  const held = holders.find(({ pid }) => first?.holds.includes(pid))
  const sentence =
    `${routes.join(', ')} ${second.length === 1 ? 'holds a connection and waits' : 'hold connections and wait'} for a ` +
    `second one: ${many(second.length, 'such request')} in a pool of ${capacityOf(facts)} can lock each other out. Open ` +
    `the second session before the first statement of request.db, or after request.db.commit(), or do both on one session`
  const evidence = {
    waitingForSecond: second.length,
    holdsAt: held?.callSite,
    waitsAt: first?.callSite,
    lastStatement: held?.lastStatement,
  }
  return { cause: 'hold-and-wait', sentence, routes, evidence }
}

// As above, where it is not known who opened the waiting sessions: nothing came back, and as many wait as there are holders.
function jam(facts: Facts): Verdict | undefined {
  const { holders, waiters } = facts.snapshot
  const unknown = waiters.filter(({ requestId, openedBy }) => requestId === '' && openedBy === undefined)
  const waited = unknown.map(({ waitedMillis }) => waitedMillis)
  const isStuck = ({ state, requestId, heldMillis, stateMillis }: HolderSnapshot) => {
    const isSilent = state === 'idle' && stateMillis >= Math.min(...waited)
    return isSilent && requestId !== '' && heldMillis >= Math.max(...waited)
  }
  const areAllIdle = Math.max(...waited) >= facts.timeoutMillis / 2 && holders.every(isStuck)
  const isJam = holders.length >= capacityOf(facts) && areAllIdle && unknown.length >= holders.length
  if (!isJam) return undefined
  const routes = ranked(holders.map(ownerOf))
  const sentence =
    `All ${holders.length} connections are held by requests (${routes.join(', ')}) that have sent nothing since ` +
    `${unknown.length} sessions of fastify.db wait for one: each waits for a second connection. Open the second session ` +
    `before the first statement of request.db, or after request.db.commit(), or do both on one session`
  const evidence = { waitingForSecond: unknown.length, waitsAt: unknown[0]?.callSite }
  return { cause: 'hold-and-wait', sentence, routes, evidence }
}

/** Held after the response, or for far too long with nothing of it coming back. */
function leak(facts: Facts): Verdict | undefined {
  const { leakDetectionMillis, timeoutMillis, snapshot } = facts
  const limit = leakDetectionMillis || Math.max(3 * timeoutMillis, 1000)
  const returned = new Set(facts.recent.routes.map(labelOf))
  // Whoever others wait for may be slow and no more: their locks are the cause then.
  const blockers = new Set(facts.server?.backends.flatMap(({ blockedBy }) => blockedBy))
  const isLeaked = (holder: HolderSnapshot) => {
    const isQuiet = holder.state === 'idle'
    const isAnswered = isQuiet && holder.answeredMillis !== undefined && holder.answeredMillis > ANSWERED_MILLIS
    const isForgotten = isQuiet && holder.stateMillis > limit && !returned.has(ownerOf(holder))
    const isLost = isForgotten || (isQuiet && holder.stateMillis > 3 * limit)
    return isAnswered || (isLost && !blockers.has(holder.pid))
  }
  const leaked = snapshot.holders.filter(isLeaked)
  if (leaked.length === 0 || leaked.length < capacityOf(facts) * SHARE) return undefined
  const routes = ranked(leaked.map(ownerOf))
  const oldest = leaked.reduce((one, other) => (other.heldMillis > one.heldMillis ? other : one))
  const answered = leaked.filter(({ answeredMillis }) => answeredMillis !== undefined).length
  const after = answered > 0 ? `, ${answered} of them after the response was sent` : ''
  const where = oldest.callSite === undefined ? ' (leakDetectionMillis would log where each was checked out)' : ''
  const sentence =
    `${routes.join(', ')} ${leaked.length === 1 ? 'keeps a connection' : `keep ${leaked.length} connections`} and ` +
    `${leaked.length === 1 ? 'does' : 'do'} nothing with ${leaked.length === 1 ? 'it' : 'them'}, for up to ` +
    `${seconds(oldest.heldMillis)}${after}: a handler or a session(fn) that never ends. Find what it waits for${where}`
  const evidence = {
    leaked: leaked.length,
    oldestMillis: Math.round(oldest.heldMillis),
    answered,
    checkedOutAt: oldest.callSite,
    lastStatement: oldest.lastStatement,
  }
  return { cause: 'leak', sentence, routes, evidence }
}

/** Who blocks whom, in the server's own words. */
function lockWait(facts: Facts): Verdict | undefined {
  const { holders } = facts.snapshot
  const seen = new Map((facts.server?.backends ?? []).map((backend) => [backend.pid, backend]))
  const isBlocked = ({ pid, state }: HolderSnapshot) => state === 'busy' && (seen.get(pid)?.blockedBy.length ?? 0) > 0
  const blocked = holders.filter(isBlocked)
  if (blocked.length === 0 || blocked.length < capacityOf(facts) * SHARE) return undefined
  const blockers = rootsOf(blocked, seen)
  const ours = blockers.flatMap(({ pid }) => holders.find((holder) => holder.pid === pid) ?? [])
  const guilty = ranked(ours.map(ownerOf))
  const victims = ranked(blocked.map(ownerOf))
  const described = blockers.map((backend) => describeBlocker(backend, holders))
  const sentence =
    `${blocked.length} of ${many(holders.length, 'connection')} (${victims.join(', ')}) wait for locks held by ` +
    `${described.join(' and ')}. Let that transaction end sooner (commit before slow work, lock rows in one order), ` +
    `or end it with pg_terminate_backend(pid); statementTimeoutMillis or lock_timeout bound the wait`
  const evidence = {
    blocked: blocked.map(({ pid, lastStatement, stateMillis }) => ({
      pid,
      blockedBy: seen.get(pid)?.blockedBy,
      waitedMillis: Math.round(stateMillis),
      lastStatement,
    })),
    blockers: blockers.map(({ pid, state, applicationName, userName, query, stateMillis }) => ({
      pid,
      route: ours.filter((holder) => holder.pid === pid).map(ownerOf)[0],
      state,
      applicationName,
      userName,
      query,
      stateMillis: Math.round(stateMillis),
    })),
  }
  return { cause: 'lock-wait', sentence, routes: guilty.length > 0 ? guilty : victims, evidence }
}

/** Those at the end of the chains: they block and are not blocked. */
function rootsOf(blocked: readonly HolderSnapshot[], seen: ReadonlyMap<number, BackendView>): BackendView[] {
  const pids = new Set(blocked.flatMap(({ pid }) => seen.get(pid)?.blockedBy ?? []))
  for (const pid of pids) for (const next of seen.get(pid)?.blockedBy ?? []) pids.add(next)
  const all = Array.from(pids).flatMap((pid) => seen.get(pid) ?? [])
  const roots = all.filter(({ blockedBy }) => blockedBy.length === 0)
  return roots.length > 0 ? roots : all
}

function describeBlocker(
  { pid, state, stateMillis, applicationName, userName }: BackendView,
  holders: Facts['snapshot']['holders'],
): string {
  const holder = holders.find((one) => one.pid === pid)
  const who = holder
    ? ownerOf(holder)
    : `somebody outside of this pool (${applicationName || 'unnamed'}, user ${userName})`
  return `${who}, backend ${pid}, ${state} for ${seconds(stateMillis)}`
}

/** The connections' time, by route: what was given back of late, and what is held now. */
function useOf({ recent, snapshot }: Facts): RouteUse[] {
  const all = new Map(recent.routes.map((use) => [labelOf(use), { ...use }]))
  for (const holder of snapshot.holders) {
    const { method, route } = holder.openedBy ?? holder
    const label = labelOf({ method, route })
    const use = all.get(label) ?? { method, route, count: 0, heldMillis: 0, busyMillis: 0, statements: 0 }
    const { count, heldMillis, busyMillis, statements } = use
    all.set(label, {
      method,
      route,
      count: count + 1,
      heldMillis: heldMillis + holder.heldMillis,
      busyMillis: busyMillis + holder.busyMillis,
      statements: statements + holder.statements,
    })
  }
  return [...all.values()]
}

function sumsOf(uses: readonly RouteUse[]) {
  const sum = { count: 0, heldMillis: 0, busyMillis: 0, statements: 0 }
  for (const use of uses) {
    sum.count += use.count
    sum.heldMillis += use.heldMillis
    sum.busyMillis += use.busyMillis
    sum.statements += use.statements
  }
  return sum
}

// Whoever has at least a quarter of what the worst has.
function worst(uses: readonly RouteUse[], millisOf: (use: RouteUse) => number): string[] {
  const sorted = [...uses].sort((a, b) => millisOf(b) - millisOf(a))
  const most = sorted[0] === undefined ? 0 : millisOf(sorted[0])
  return sorted.filter((use) => millisOf(use) > 0 && millisOf(use) >= most / 4).map(labelOf)
}

function evidenceOf(facts: Facts) {
  const { count, heldMillis, busyMillis, statements } = sumsOf(useOf(facts))
  const each = (value: number) => (count === 0 ? 0 : Math.round((value / count) * 10) / 10)
  return {
    sessions: count,
    meanHoldMillis: each(heldMillis),
    meanBusyMillis: each(busyMillis),
    meanIdleMillis: each(heldMillis - busyMillis),
    meanStatements: each(statements),
    busyShare: heldMillis === 0 ? 0 : Math.round((busyMillis / heldMillis) * 100) / 100,
  }
}

/** The server works, and takes long. */
function slowSql(facts: Facts): Verdict | undefined {
  const evidence = evidenceOf(facts)
  const limit = Math.min(200, Math.max(50, facts.timeoutMillis / 2))
  if (evidence.busyShare < 0.5 || evidence.meanBusyMillis < limit) return undefined
  const uses = useOf(facts)
  const routes = worst(uses, ({ busyMillis }) => busyMillis)
  const last = facts.snapshot.holders.find((holder) => ownerOf(holder) === routes[0])?.lastStatement
  const { meanStatements } = evidence
  const advice =
    meanStatements > 20
      ? `Each sends ${Math.round(meanStatements)} statements: send fewer, or send them together (Promise.all, one query for many rows)`
      : 'EXPLAIN (ANALYZE, BUFFERS) its statements, add the index or the limit they lack; statementTimeoutMillis bounds them'
  const sentence =
    `The connections are busy with slow SQL: a session of ${routes.join(', ')} keeps the server busy for ` +
    `${seconds(evidence.meanBusyMillis)} on average. ${advice}. A larger pool would only queue up inside of PostgreSQL`
  return { cause: 'slow-sql', sentence, routes, evidence: { ...evidence, lastStatement: last } }
}

/** The app does something else while the server waits in its transaction. */
function heldIdle(facts: Facts): Verdict | undefined {
  const evidence = evidenceOf(facts)
  if (evidence.busyShare >= 0.5 || evidence.meanIdleMillis < IDLE_MILLIS) return undefined
  const routes = worst(useOf(facts), ({ heldMillis, busyMillis }) => heldMillis - busyMillis)
  const isFirst = facts.recent.routes.length === 0
  const forever = isFirst
    ? ' None has come back so far: if none ever does it is a leak, which leakDetectionMillis would show.'
    : ''
  const sentence =
    `The connections are held idle, not busy: ${routes.join(', ')} ${routes.length === 1 ? 'holds' : 'hold'} one for ` +
    `${seconds(evidence.meanHoldMillis)} on average, ${seconds(evidence.meanIdleMillis)} of it idle in transaction while the ` +
    `handler does other work. Do that work before the first statement, or await request.db.commit() before it.${forever}`
  return { cause: 'held-idle', sentence, routes, evidence }
}

/** Busy, short holds, more arrivals than it can serve. */
function poolTooSmall(facts: Facts): Verdict {
  const evidence = evidenceOf(facts)
  const { recent, snapshot, capacity, processes } = facts
  const arrivals = evidence.sessions + snapshot.waiting + recent.refused
  const ratePerSecond = (arrivals * 1000) / recent.millis
  const size = Math.max(capacityOf(facts) + 1, serversFor(ratePerSecond, evidence.meanHoldMillis))
  const room = capacity && Math.floor((capacity.maxConnections - capacity.reserved - capacity.others) / processes)
  const advice =
    room !== undefined && size > room
      ? `That needs about ${size}, but the server has room for ${room} a process: hold connections for a shorter time, send ` +
        `fewer statements, let fewer requests in, or raise max_connections`
      : `Size and overflow of ${size} in all would do`
  const sentence =
    `The pool is too small: its ${capacityOf(facts)} connections work, are held for ${seconds(evidence.meanHoldMillis)} on ` +
    `average, and ${Math.round(ratePerSecond)} sessions a second ask for one (by Little's law ` +
    `${((ratePerSecond * evidence.meanHoldMillis) / 1000).toFixed(1)} in use at once). ${advice}`
  const routes = worst(useOf(facts), ({ heldMillis }) => heldMillis)
  const figures = {
    ...evidence,
    ratePerSecond: Math.round(ratePerSecond),
    neededConnections: size,
    roomPerProcess: room,
  }
  return { cause: 'pool-too-small', sentence, routes, evidence: figures }
}
