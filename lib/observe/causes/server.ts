import type { Verdict } from '../cause.ts'
import type { Facts } from '../facts.ts'
import { fullOf, isServerFull, reasonOf } from '../unreachable.ts'
import { capacityOf } from '../words.ts'

/** Refused, silent, full: before anything else, since nobody's use of the pool can be blamed. */
export function lookAtServer(facts: Facts): Verdict | undefined {
  const { snapshot, failedConnect, timeoutMillis } = facts
  const isGrowing = snapshot.open < capacityOf(facts)
  const recentFailure =
    failedConnect && isGrowing && failedConnect.agoMillis <= 2 * timeoutMillis ? failedConnect.error : undefined
  const error = facts.cause ?? recentFailure ?? silenceOf(facts)
  if (error === undefined) return undefined
  if (isServerFull(error)) return serverFull(facts, error)
  const isLost = facts.code === 'FST_REQUEST_DB_CONNECTION_LOST'
  const { kind, sentence } = reasonOf(error, isLost)
  const { code } = error as { code?: string }
  // PostgreSQL names the user there.
  const text = kind === 'credentials' ? undefined : error.message
  return { cause: 'unreachable', sentence, routes: [], evidence: { kind, code, error: text } }
}

/** Nothing comes from the server: neither to who opens a connection, nor to who asked it what it does. */
function silenceOf(facts: Facts): Error | undefined {
  const { snapshot, server, timeoutMillis, answeredMillis } = facts
  const patience = timeoutMillis === 0 ? 500 : Math.min(1000, Math.max(100, timeoutMillis / 2))
  const slow = facts.connecting.filter((millis) => millis >= patience).length
  const isStuck = slow > 0 && slow >= capacityOf(facts) - snapshot.checkedOut
  if (isStuck && snapshot.open < capacityOf(facts)) return new Error('The server does not answer')
  // One that has no connection left for the question still answers the others.
  const failed = server?.error
  return failed && !isServerFull(failed) && answeredMillis > server.agoMillis ? failed : undefined
}

const LIMITS = {
  role: 'the limit of its role is reached: ALTER ROLE … CONNECTION LIMIT',
  database: 'the limit of the database is reached: ALTER DATABASE … CONNECTION LIMIT',
}

function serverFull(facts: Facts, error: Error): Verdict {
  const { snapshot, capacity, processes } = facts
  const whose = fullOf(error)
  const open = `this pool has ${snapshot.open} open`
  const evidence = { limit: whose, open: snapshot.open, processes, error: error.message }
  if (whose !== 'server') {
    const sentence =
      `PostgreSQL gives no more connections (53300): ${LIMITS[whose]} sets it; ${open}. Raise it, lower pool.size of all ` +
      `processes, or put PgBouncer in between`
    return { cause: 'server-full', sentence, routes: [], evidence }
  }
  const max = capacity?.maxConnections
  const usable = capacity && capacity.maxConnections - capacity.reserved
  const others = usable === undefined ? undefined : Math.max(0, usable - snapshot.open)
  const who =
    others === undefined
      ? 'other clients hold all that this pool does not'
      : `of its ${usable} usable ones (max_connections ${max}) others hold about ${others}`
  const sentence =
    `PostgreSQL has no connection left (53300): ${open}, ${who}. Find out who in pg_stat_activity; lower pool.size of all ` +
    `processes, raise max_connections, or put PgBouncer in between`
  return {
    cause: 'server-full',
    sentence,
    routes: [],
    evidence: { ...evidence, maxConnections: max, heldByOthers: others },
  }
}
