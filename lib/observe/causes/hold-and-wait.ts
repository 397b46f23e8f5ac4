import type { Verdict } from '../cause.ts'
import type { Facts } from '../facts.ts'
import type { HolderSnapshot, WaiterSnapshot } from '../snapshot.ts'
import { capacityOf, many, ownerOf, ranked } from '../words.ts'

// Timers are not exact, nor is the order in which two clocks are read.
const JITTER_MILLIS = 10

/** A request that holds a connection waits for a second one. */
export function holdAndWait(facts: Facts): Verdict | undefined {
  const { holders, waiters } = facts.snapshot
  const second = waiters.filter(({ holds }) => holds.length > 0)
  if (second.length === 0) return jam(facts)
  const holderOf = ({ holds }: WaiterSnapshot) => holders.find(({ pid }) => holds.includes(pid))
  // Of a request that is injected by another one, it is the other that holds.
  const routes = ranked(second.map((waiter) => ownerOf(holderOf(waiter) ?? waiter)))
  const injected = ranked(second.map(ownerOf)).filter((label) => !routes.includes(label))
  const what = injected.length > 0 ? `second one, for ${injected.join(', ')}` : 'second one'
  const [first] = second
  const held = first && holderOf(first)
  const sentence =
    `${routes.join(', ')} ${second.length === 1 ? 'holds a connection and waits' : 'hold connections and wait'} for a ` +
    `${what}: ${second.length === 1 ? 'one such request' : `${second.length} such requests`}, and ${capacityOf(facts)} at a ` +
    `time jam the pool for good. Open the second session before the first statement of request.db, or after ` +
    `request.db.commit(), or do both on one session`
  const evidence = {
    waitingForSecond: second.length,
    holdsAt: held?.callSite,
    waitsAt: first?.callSite,
    lastStatement: held?.lastStatement,
  }
  return { cause: 'hold-and-wait', sentence, routes, evidence }
}

// As above, where it is not known who opened the waiting sessions: as many wait as there are holders, and each holder has
// been silent since before one of them began to.
function jam(facts: Facts): Verdict | undefined {
  const { holders, waiters } = facts.snapshot
  const unknown = waiters.filter(({ requestId, openedBy }) => requestId === '' && openedBy === undefined)
  const waited = unknown.map(({ waitedMillis }) => waitedMillis)
  // Of requests that are followed it would be known.
  const isUnfollowed = ({ state, requestId, pid }: HolderSnapshot) =>
    state === 'idle' && requestId !== '' && !facts.followed.has(pid)
  const longestFirst = (a: number, b: number) => b - a
  const silent = holders.map(({ stateMillis }) => stateMillis).sort(longestFirst)
  const oldest = waited.sort(longestFirst).slice(0, silent.length)
  const isJam =
    holders.length >= capacityOf(facts) &&
    holders.every(isUnfollowed) &&
    oldest.length === silent.length &&
    (oldest[0] ?? 0) >= facts.timeoutMillis / 2 &&
    silent.every((millis, index) => millis >= (oldest[index] ?? 0) - JITTER_MILLIS)
  if (!isJam) return undefined
  const routes = ranked(holders.map(ownerOf))
  const sentence =
    `All ${many(holders.length, 'connection')} are held by requests (${routes.join(', ')}) that have sent nothing since ` +
    `${many(unknown.length, 'session')} of fastify.db began to wait for one: most likely each waits for a second connection. ` +
    `Open the second session before the first statement of request.db, or after request.db.commit(), or do both on one session`
  const evidence = { waitingForSecond: unknown.length, waitsAt: unknown[0]?.callSite }
  return { cause: 'hold-and-wait', sentence, routes, evidence }
}
