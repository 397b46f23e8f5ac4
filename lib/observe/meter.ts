import type { Cause } from './cause.ts'
import { listen } from './channels.ts'
import type { ObservedPool, Snapshot } from './snapshot.ts'

/** What both exporters measure, under the names of OpenTelemetry's conventions for database clients. */
interface Instrument {
  readonly name: string
  readonly unit: string
  readonly help: string
}

/** A value, and the state of the connections it counts where they are told apart. */
interface Point {
  readonly value: number
  readonly state?: 'idle' | 'used'
}

/** Read from a snapshot when somebody asks. */
export interface Reading extends Instrument {
  /** It only ever grows. */
  readonly isTotal: boolean
  readonly of: (snapshot: Snapshot) => readonly Point[]
}

const level = (name: string, unit: string, help: string, of: (snapshot: Snapshot) => number): Reading => ({
  name,
  unit,
  help,
  isTotal: false,
  of: (snapshot) => [{ value: of(snapshot) }],
})
const total = (name: string, unit: string, help: string, of: (snapshot: Snapshot) => number): Reading => ({
  ...level(name, unit, help, of),
  isTotal: true,
})

export const READINGS: readonly Reading[] = [
  {
    name: 'db.client.connection.count',
    unit: '{connection}',
    help: 'Connections that are open now, by state',
    isTotal: false,
    // One that is being pinged is neither idle nor checked out, and of no use to anybody else.
    of: ({ open, idle }) => [
      { value: idle, state: 'idle' },
      { value: open - idle, state: 'used' },
    ],
  },
  level('db.client.connection.max', '{connection}', 'Most connections that may be open', ({ size, maxOverflow }) => {
    return size + maxOverflow
  }),
  level('db.client.connection.idle.max', '{connection}', 'Most connections that are kept idle', ({ size }) => size),
  level('db.client.connection.pending_requests', '{request}', 'Sessions that wait for a connection', ({ waiters }) => {
    return waiters.length
  }),
  total(
    'db.client.connection.timeouts',
    '{timeout}',
    'Sessions refused after waiting too long for a connection',
    ({ totals }) => totals.timeouts,
  ),
]

/** What the conventions have no names for. */
export const OWN_READINGS: readonly Reading[] = [
  own('commits', '{transaction}', 'Transactions committed', 'commits'),
  own('rollbacks', '{transaction}', 'Transactions rolled back', 'rollbacks'),
  own('failed_commits', '{transaction}', 'COMMITs that failed', 'failedCommits'),
  own('hand_overs', '{checkout}', 'Check-outs right behind the COMMIT or ROLLBACK of another session', 'handOvers'),
  own('saturated', '{request}', 'Sessions refused at once because too many were waiting', 'saturated'),
  own('invalidated', '{connection}', 'Connections destroyed because they were dead, dirty or suspect', 'invalidated'),
  own('failed_connects', '{connection}', 'Connections that could not be opened', 'failedConnects'),
]

function own(name: string, unit: string, help: string, key: keyof Snapshot['totals']): Reading {
  return total(`fastify_request_db.${name}`, unit, help, ({ totals }) => totals[key])
}

/** How long something took, in seconds. */
export type Duration = 'createTime' | 'waitTime' | 'useTime'

export const DURATIONS: Readonly<Record<Duration, Instrument>> = {
  createTime: { name: 'db.client.connection.create_time', unit: 's', help: 'Time to open a connection' },
  waitTime: {
    name: 'db.client.connection.wait_time',
    unit: 's',
    help: 'Time from asking for a connection to having it',
  },
  useTime: { name: 'db.client.connection.use_time', unit: 's', help: 'Time from check-out to check-in' },
}
/** From what the network takes, to what a timeout of 10 s leaves. */
export const BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]

/** Calls `record` for each duration the pool tells of. Returns how to stop it. `record` must not throw. */
export function listenToDurations(
  pool: ObservedPool,
  record: (duration: Duration, seconds: number) => void,
): () => void {
  return listen(pool, {
    connect: ({ millis, error }) => {
      if (error === undefined) record('createTime', millis / 1000)
    },
    checkout: ({ waitedMillis }) => record('waitTime', waitedMillis / 1000),
    checkin: ({ heldMillis }) => record('useTime', heldMillis / 1000),
  })
}

const causes: Record<Cause, true> = {
  unreachable: true,
  'server-full': true,
  'hold-and-wait': true,
  leak: true,
  'lock-wait': true,
  'slow-sql': true,
  'held-idle': true,
  'pool-too-small': true,
}
/** Every verdict there can be, and `none` where the server is shutting down. */
export const CAUSES: readonly string[] = [...Object.keys(causes), 'none']
