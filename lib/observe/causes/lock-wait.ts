import type { Verdict } from '../cause.ts'
import type { BackendView, Facts } from '../facts.ts'
import type { HolderSnapshot } from '../snapshot.ts'
import { enoughOf, many, ownerOf, ranked, seconds } from '../words.ts'

// For how long the routes that were seen waiting for locks are taken to do so still.
const BLOCKED_MILLIS = 3000

/** Who blocks whom, in the server's own words. */
export function lockWait(facts: Facts): Verdict | undefined {
  const { server, snapshot } = facts
  if (server === undefined) return undefined
  const { agoMillis, backends } = server
  const seen = new Map(backends.map((backend) => [backend.pid, backend]))
  const isBlocked = ({ pid, state }: HolderSnapshot) => state === 'busy' && (seen.get(pid)?.blockedBy.length ?? 0) > 0
  const enough = enoughOf(facts)
  // What has begun since was not seen: the same backend may serve another one by now.
  const isSame = ({ heldMillis }: HolderSnapshot) => heldMillis >= agoMillis
  const now = snapshot.holders.filter((holder) => isBlocked(holder) && holder.stateMillis >= agoMillis)
  if (now.length >= enough) {
    return blockedBy(now, snapshot.holders.filter(isSame), seen, agoMillis)
  }
  // Where many wait a little for the same row, others do by now, of the same routes.
  const then = server.holders.filter(isBlocked)
  const routes = new Set(then.map(ownerOf))
  const still = snapshot.holders.filter((holder) => holder.state === 'busy' && routes.has(ownerOf(holder)))
  const isRecent = agoMillis <= BLOCKED_MILLIS && still.length >= enough
  return isRecent && then.length >= enough ? blockedBy(then, server.holders, seen, 0) : undefined
}

function blockedBy(
  blocked: readonly HolderSnapshot[],
  holders: readonly HolderSnapshot[],
  seen: ReadonlyMap<number, BackendView>,
  agoMillis: number,
): Verdict {
  const blockers = rootsOf(blocked, seen)
  const ours = blockers.flatMap(({ pid }) => holders.find((holder) => holder.pid === pid) ?? [])
  const guilty = ranked(ours.map(ownerOf))
  const victims = ranked(blocked.map(ownerOf))
  const described = blockers.map((backend) => describeBlocker(backend, ours, agoMillis))
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
  ours: readonly HolderSnapshot[],
  agoMillis: number,
): string {
  const holder = ours.find((one) => one.pid === pid)
  const who = holder
    ? ownerOf(holder)
    : `somebody outside of this pool (${applicationName || 'unnamed'}, user ${userName})`
  return `${who}, backend ${pid}, ${state} for ${seconds(stateMillis + agoMillis)}`
}
