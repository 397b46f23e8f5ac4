import cluster from 'node:cluster'
import { availableParallelism } from 'node:os'
import type { FastifyBaseLogger } from 'fastify'
import pg from 'pg'
import { type Fleet, largestFit, neededBy } from './room.ts'
import { isServerFull } from './unreachable.ts'

/** How many connections the server has, and who uses them. */
export interface Capacity {
  /** `max_connections`. */
  readonly maxConnections: number
  /** Of these, kept for superusers and privileged roles: `superuser_reserved_connections` and `reserved_connections`. */
  readonly reserved: number
  /** In use by clients with our application name and user, other processes' pools included. */
  readonly ours: number
  /** In use by everybody else. */
  readonly others: number
}

/** How many processes like this one share the server, and who said so. */
export interface Processes {
  readonly count: number
  readonly from: 'option' | 'WEB_CONCURRENCY' | 'cluster' | 'default'
}

/** The option `processes`, else WEB_CONCURRENCY, else what `node:cluster` says, else 1. */
export function processesOf(
  option: number | undefined,
  environment: Readonly<Record<string, string | undefined>> = process.env,
  siblings: Pick<typeof cluster, 'isPrimary' | 'worker' | 'workers'> = cluster,
  cores = availableParallelism(),
): Processes {
  if (option !== undefined) return { count: option, from: 'option' }
  const concurrency = environment.WEB_CONCURRENCY ?? ''
  if (/^\s*[1-9]\d*\s*$/.test(concurrency)) return { count: Number(concurrency), from: 'WEB_CONCURRENCY' }
  // A worker cannot see its siblings, but they are numbered from 1: there have been at least as many as its number. Who
  // replaces a dead one has a number of its own, so that with time they would seem to be ever more: one a core is taken
  // for the most.
  const number = Math.min(siblings.worker?.id ?? 0, cores)
  const workers = siblings.isPrimary ? Object.keys(siblings.workers ?? {}).length : number
  return workers > 0 ? { count: workers, from: 'cluster' } : { count: 1, from: 'default' }
}

// Of sessions of other roles, only who may read all statistics sees the backend_type: to others any session of a user
// in a database is a client. Replication does not count towards max_connections.
const QUERY = `
  with clients as (
    select application_name = current_setting('application_name') and usename = session_user as is_ours
    from pg_stat_activity
    where pid <> pg_backend_pid() and usename is not null
      and (backend_type = 'client backend' or backend_type is null and datid is not null)
  )
  select pg_backend_pid() as pid, current_setting('max_connections') as max,
    current_setting('superuser_reserved_connections')::int + coalesce(current_setting('reserved_connections', true)::int, 0)
      as reserved,
    (select count(*) from clients where is_ours) as ours,
    (select count(*) from clients where not is_ours) as others`

type Row = Readonly<Record<'pid' | 'max' | 'reserved' | 'ours' | 'others', unknown>>

// What pg's types do not show.
interface Wire {
  readonly processID: number | null
  readonly connection: { readonly stream: { destroy(): void } }
  unref(): void
}

/**
 * Asks the server, over a connection of its own that is closed afterwards in every case. It keeps no process alive, so
 * that whoever waits for it while the process may end has to abort it.
 * @throws what pg says, or an error when there is no answer within `timeoutMillis`, when a pooler stands in between, or
 * when it is aborted.
 */
export async function readCapacity(
  config: pg.ClientConfig,
  timeoutMillis: number,
  signal?: AbortSignal,
): Promise<Capacity> {
  signal?.throwIfAborted()
  const client = new pg.Client({ ...config, connectionTimeoutMillis: 0 })
  const wire = client as unknown as Wire
  // What goes wrong is told by the promises below; pg may say it once more.
  client.on('error', () => {})
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    const error = new Error(`No answer within ${timeoutMillis} ms`)
    timer = setTimeout(reject, timeoutMillis, error).unref()
    signal?.addEventListener('abort', () => reject(signal.reason), { once: true })
  })
  try {
    const asked = ask(client, wire)
    // Where it is too late, nobody waits for it any more.
    asked.catch(() => {})
    const row = await Promise.race([asked, late])
    return toCapacity(row, wire.processID)
  } finally {
    clearTimeout(timer)
    wire.connection.stream.destroy()
  }
}

/** The server says that our backend has another process id than was announced to us. */
class PoolerFound extends Error {}

async function ask(client: pg.Client, wire: Wire): Promise<Row> {
  const connected = client.connect()
  wire.unref()
  await connected
  const { rows } = await client.query<Row>(QUERY)
  // Resolves when the server, too, has closed its side: its place is free again.
  await client.end()
  return rows[0]!
}

function toCapacity({ pid, max, reserved, ours, others }: Row, announcedPid: number | null): Capacity {
  if (announcedPid !== null && announcedPid !== Number(pid)) {
    throw new PoolerFound(
      'A pooler stands between this process and PostgreSQL: how many connections there are is up to it',
    )
  }
  return {
    maxConnections: Number(max),
    reserved: Number(reserved),
    ours: Number(ours),
    others: Number(others),
  }
}

/** What is to be compared. */
export interface Comparison extends Fleet {
  readonly capacity: Capacity
}

/** A line for the log. */
export interface Warning {
  /** For a person: what will happen, and what to change. */
  readonly message: string
  readonly fields: Readonly<Record<string, unknown>>
}

/** Says so where all pools together can grow beyond what the server has for them; undefined where they cannot. */
export function capacityWarning({ capacity, ...fleet }: Comparison): Warning | undefined {
  const { processes, size, maxOverflow } = fleet
  const { maxConnections, reserved, ours } = capacity
  const needed = neededBy(fleet)
  // What bears our name beyond what we can come to hold is somebody else's: another app, one more process.
  const others = capacity.others + Math.max(0, ours - needed)
  const room = Math.max(0, maxConnections - reserved - others)
  if (needed <= room) return undefined
  const fit = largestFit(fleet, room)
  const shrink = fit
    ? `Set pool.size to ${fit.size} and pool.maxOverflow to ${fit.maxOverflow}`
    : `Not even one connection for each of ${count(processes, 'process')} is left: run fewer of them`
  const message =
    `PostgreSQL has room for ${count(room, 'connection')}, but ${count(processes, 'process')} x (size ${size} + maxOverflow ` +
    `${maxOverflow}) can ask for ${needed}; then it refuses connections (53300). Of its max_connections ${maxConnections}, ` +
    `${reserved} are reserved and ${others} are used by others. ${shrink}, or raise max_connections to at least ` +
    `${needed + reserved + others}, or put PgBouncer in between`
  return { message, fields: { ...fleet, needed, room, maxConnections, reserved, others, largestFit: fit } }
}

const count = (number: number, what: string) =>
  `${number} ${number === 1 ? what : what.endsWith('s') ? `${what}es` : `${what}s`}`

/** Whose capacity is checked, and where to say it. */
export interface CapacityCheck {
  readonly config: pg.ClientConfig
  readonly options: {
    readonly name: string
    readonly size: number
    readonly maxOverflow: number
    readonly processes: number | undefined
  }
  readonly log: Pick<FastifyBaseLogger, 'warn' | 'debug'>
  readonly timeoutMillis: number
  readonly signal?: AbortSignal
}

/** Asks the server, logs a warning where it has too few connections, and says what it has. Never throws. */
export async function checkCapacity(check: CapacityCheck): Promise<Capacity | undefined> {
  const { config, log, timeoutMillis, signal } = check
  const { name, size, maxOverflow } = check.options
  const { count: processes, from } = processesOf(check.options.processes)
  const requestDb = { event: 'capacity', pool: name, processesFrom: from }
  try {
    const capacity = await readCapacity(config, timeoutMillis, signal)
    const warning = capacityWarning({ processes, size, maxOverflow, capacity })
    if (warning)
      log.warn({ requestDb: { ...requestDb, ...warning.fields } }, `request-db: pool "${name}": ${warning.message}`)
    else
      log.debug(
        { requestDb: { ...requestDb, ...capacity } },
        `request-db: PostgreSQL has room for all of pool "${name}"`,
      )
    return capacity
  } catch (error) {
    if (signal?.aborted) return undefined
    const needed = neededBy({ processes, size, maxOverflow })
    // The first one of all was let in, and already the second is not: that is what the check is for.
    if (isServerFull(error as Error)) {
      log.warn({ requestDb: { ...requestDb, needed }, err: error }, `request-db: pool "${name}": ${FULL}`)
    } else if (error instanceof PoolerFound) {
      log.warn({ requestDb, err: error }, `request-db: pool "${name}": ${POOLED}`)
    } else {
      log.debug({ requestDb, err: error }, `request-db: it is not known whether PostgreSQL has room for pool "${name}"`)
    }
    return undefined
  }
}

const POOLED =
  'a pooler such as PgBouncer stands between this process and PostgreSQL. If it pools transactions (pool_mode = ' +
  "transaction), set the option pooler: 'transaction': without it, sessions can get into one another's transactions. If it " +
  'pools sessions, set capacityCheck: false'
const FULL =
  'PostgreSQL has no connection left (53300) beyond those that are open. See in pg_stat_activity who holds them; ' +
  'lower pool.size of all processes, raise max_connections, or put PgBouncer in between'
