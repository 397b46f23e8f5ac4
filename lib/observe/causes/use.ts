import type { Verdict } from '../cause.ts'
import type { Facts, RouteUse } from '../facts.ts'
import { serversFor } from '../queueing.ts'
import type { HolderSnapshot } from '../snapshot.ts'
import { capacityOf, labelOf, many, ownerOf, ranked, seconds } from '../words.ts'

// A statement, or all those of a session together, that keeps the server busy for longer is slow.
const SLOW_MILLIS = 100
// What a connection waits between statements in any case: the event loop.
const IDLE_MILLIS = 10

const NO_USE = { count: 0, heldMillis: 0, busyMillis: 0, statements: 0 }

/** What these sessions do with their connections, by route. */
function byRoute(holders: readonly HolderSnapshot[], finished: readonly RouteUse[] = []): RouteUse[] {
  const all = new Map(finished.map((use) => [labelOf(use), use]))
  const means = new Map(finished.map((use) => [labelOf(use), use.heldMillis / use.count]))
  for (const holder of holders) {
    const { method, route } = holder.openedBy ?? holder
    const label = labelOf({ method, route })
    // One that has only just begun says nothing about how long they take.
    if (holder.heldMillis < (means.get(label) ?? 0)) continue
    const { count, heldMillis, busyMillis, statements } = all.get(label) ?? NO_USE
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

const useOf = ({ recent, snapshot }: Facts) => byRoute(snapshot.holders, recent.routes)

function sumsOf(uses: readonly RouteUse[]) {
  const sum = { ...NO_USE }
  for (const use of uses) {
    sum.count += use.count
    sum.heldMillis += use.heldMillis
    sum.busyMillis += use.busyMillis
    sum.statements += use.statements
  }
  return sum
}

type Kind = 'slow' | 'idle' | 'short'

/** What the sessions of one route are, on average: means over all routes would hide the few that hold for long. */
function kindOf({ count, heldMillis, busyMillis }: RouteUse, slowMillis: number): Kind {
  const idleMillis = heldMillis - busyMillis
  if (busyMillis >= idleMillis) return busyMillis >= slowMillis * count ? 'slow' : 'short'
  return idleMillis >= IDLE_MILLIS * count ? 'idle' : 'short'
}

/** What the connections' time goes to, and the routes it goes to, worst first. */
function mainUse(facts: Facts): { kind: Kind; uses: RouteUse[] } {
  const long = facts.snapshot.holders.filter(({ heldMillis }) => heldMillis >= Math.max(50, facts.timeoutMillis / 2))
  // Whoever was refused has waited for these, and for no others.
  const isLong = facts.timeoutMillis > 0 && long.length >= capacityOf(facts) / 2
  const uses = isLong ? byRoute(long) : useOf(facts)
  // These are not even finished.
  const slowMillis = isLong ? Math.min(SLOW_MILLIS, Math.max(50, facts.timeoutMillis / 2)) : SLOW_MILLIS
  const of = (kind: Kind) => uses.filter((use) => kindOf(use, slowMillis) === kind)
  const slow = of('slow')
  const idle = of('idle')
  const [slowTime, idleTime] = [sumsOf(slow).heldMillis, sumsOf(idle).heldMillis]
  const kind = slowTime >= idleTime ? 'slow' : 'idle'
  if (Math.max(slowTime, idleTime) < sumsOf(uses).heldMillis / 3 || slowTime + idleTime === 0) {
    return { kind: 'short', uses }
  }
  return { kind, uses: kind === 'slow' ? slow : idle }
}

// Whoever has at least a quarter of what the worst has.
function worst(uses: readonly RouteUse[], millisOf: (use: RouteUse) => number): string[] {
  const sorted = [...uses].sort((a, b) => millisOf(b) - millisOf(a))
  const most = sorted[0] === undefined ? 0 : millisOf(sorted[0])
  return sorted.filter((use) => millisOf(use) > 0 && millisOf(use) >= most / 4).map(labelOf)
}

function evidenceOf(uses: readonly RouteUse[]) {
  const { count, heldMillis, busyMillis, statements } = sumsOf(uses)
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
export function slowSql(facts: Facts): Verdict | undefined {
  const { kind, uses } = mainUse(facts)
  if (kind !== 'slow') return undefined
  const evidence = evidenceOf(uses)
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
export function heldIdle(facts: Facts): Verdict | undefined {
  const { kind, uses } = mainUse(facts)
  if (kind !== 'idle') return undefined
  const evidence = evidenceOf(uses)
  const routes = worst(uses, ({ heldMillis, busyMillis }) => heldMillis - busyMillis)
  const returned = new Set(facts.recent.routes.map(labelOf))
  const forever = routes.some((route) => returned.has(route) || facts.recent.longestMillis.has(route))
    ? ''
    : ' None has come back so far: if none ever does it is a leak, or each waits for a second connection (fastify.db, ' +
      'app.inject): leakDetectionMillis would show where.'
  const sentence =
    `The connections are held idle, not busy: ${routes.join(', ')} ${routes.length === 1 ? 'holds' : 'hold'} one for ` +
    `${seconds(evidence.meanHoldMillis)} on average, ${seconds(evidence.meanIdleMillis)} of it idle in transaction while the ` +
    `handler does other work, or its client sends or reads slowly. Do such work before the first statement, or await ` +
    `request.db.commit() before it.${forever}`
  return { cause: 'held-idle', sentence, routes, evidence }
}

/** Busy, short holds, more arrivals than it can serve. */
export function poolTooSmall(facts: Facts): Verdict {
  const { recent, snapshot, capacity, processes } = facts
  const uses = useOf(facts)
  const evidence = evidenceOf(uses)
  if (evidence.sessions === 0) return coldStart(facts)
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
    `The pool is too small: ${capacityOf(facts) === 1 ? 'its one connection works and is' : `its ${capacityOf(facts)} connections work and are`} ` +
    `held for ${seconds(evidence.meanHoldMillis)} on average, and ${Math.round(ratePerSecond)} sessions a second ask for one ` +
    `(by Little's law ${((ratePerSecond * evidence.meanHoldMillis) / 1000).toFixed(1)} in use at once). ${advice}`
  const routes = worst(uses, ({ heldMillis }) => heldMillis)
  const figures = {
    ...evidence,
    ratePerSecond: Math.round(ratePerSecond),
    neededConnections: size,
    roomPerProcess: room,
  }
  return { cause: 'pool-too-small', sentence, routes, evidence: figures }
}

/** Nobody has had a connection yet. */
function coldStart({ connecting, snapshot, timeoutMillis }: Facts): Verdict {
  const opening = connecting.length
  const since = seconds(Math.max(0, ...connecting))
  const sentence =
    `The pool is too small for a burst at its start: ${many(opening, 'connection')} ${opening === 1 ? 'is' : 'are'} still ` +
    `being opened, since ${since}, and more sessions ask than may wait. Raise pool.timeoutMillis (${timeoutMillis}) or ` +
    `pool.maxWaiting, or open connections before there is traffic: await fastify.db.ping() in an onReady hook`
  const routes = ranked(snapshot.waiters.map(ownerOf))
  return { cause: 'pool-too-small', sentence, routes, evidence: { opening, sinceMillis: Math.max(0, ...connecting) } }
}
