import type { Verdict } from '../cause.ts'
import type { Facts } from '../facts.ts'
import type { HolderSnapshot } from '../snapshot.ts'
import { enoughOf, labelOf, many, ownerOf, ranked, seconds } from '../words.ts'

// A response may be on its way out while its session settles.
const ANSWERED_MILLIS = 50

/** Held after the response, or for far too long with nothing of it coming back. */
export function leak(facts: Facts): Verdict | undefined {
  const { leakDetectionMillis, timeoutMillis, snapshot } = facts
  const limit = leakDetectionMillis || Math.max(5 * timeoutMillis, 2000)
  const returned = new Set(facts.recent.routes.map(labelOf))
  // Whoever others wait for may be slow and no more: their locks are the cause then.
  const blockers = new Set(facts.server?.backends.flatMap(({ blockedBy }) => blockedBy))
  const isLeaked = (holder: HolderSnapshot) => {
    const { state, stateMillis, answeredMillis = 0, pid } = holder
    if (state === 'busy') return false
    // A job that goes on after the response is none as long as it goes on.
    if (answeredMillis > ANSWERED_MILLIS && stateMillis > Math.max(ANSWERED_MILLIS, timeoutMillis / 2)) return true
    const owner = ownerOf(holder)
    const isLong = leakDetectionMillis !== false || stateMillis > 2 * (facts.recent.longestMillis.get(owner) ?? 0)
    const isForgotten = stateMillis > limit && !returned.has(owner)
    return (isForgotten || stateMillis > 3 * limit) && isLong && !blockers.has(pid)
  }
  const leaked = snapshot.holders.filter(isLeaked)
  if (leaked.length < enoughOf(facts)) return undefined
  const routes = ranked(leaked.map(ownerOf))
  const oldest = leaked.reduce((one, other) => (other.heldMillis > one.heldMillis ? other : one))
  const answered = leaked.filter(({ answeredMillis }) => answeredMillis !== undefined).length
  const after = answered > 0 ? `, ${answered} of them after the response was sent` : ''
  const where = oldest.callSite === undefined ? ' (leakDetectionMillis would log where each was checked out)' : ''
  const sentence =
    `${many(leaked.length, 'connection')} held by ${routes.join(', ')} with nothing done, for up to ` +
    `${seconds(oldest.heldMillis)}${after}: a handler or a session(fn) that does not end. Find what it waits for${where}`
  const evidence = {
    leaked: leaked.length,
    oldestMillis: Math.round(oldest.heldMillis),
    answered,
    checkedOutAt: oldest.callSite,
    lastStatement: oldest.lastStatement,
  }
  return { cause: 'leak', sentence, routes, evidence }
}
