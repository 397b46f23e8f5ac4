import * as channels from '../../lib/observe/channels.ts'
import { CAUSES, DURATIONS, listenToDurations, OWN_READINGS, READINGS } from '../../lib/observe/meter.ts'
import type { ObservedPool, Snapshot } from '../../lib/observe/snapshot.ts'
import { deafLog } from '../support/ledger.ts'
import { test } from '../support/test.ts'

/* Which figure of a snapshot and which event is which measurement. */
const totals = {
  checkouts: 1,
  handOvers: 2,
  timeouts: 3,
  saturated: 4,
  opened: 5,
  failedConnects: 6,
  closed: 7,
  recycled: 8,
  invalidated: 9,
  failedPings: 10,
  cancels: 11,
  replays: 12,
  commits: 13,
  rollbacks: 14,
  failedCommits: 15,
}
const who = { method: 'GET', route: '/', requestId: '1' }
const waiter = { ...who, waitedMillis: 1, holds: [] }
const snapshot: Snapshot = {
  name: 'db',
  size: 4,
  maxOverflow: 2,
  open: 5,
  idle: 1,
  checkedOut: 3,
  overflow: 1,
  waiting: 1,
  holders: [],
  waiters: [waiter, waiter],
  totals,
}
const pool: ObservedPool = { name: 'db', snapshot: () => snapshot }
const common = { pool, log: deafLog }

test('a snapshot is read under the names of the conventions', async (t) => {
  const read = [...READINGS, ...OWN_READINGS].map(({ name, isTotal, of }) => [name, isTotal, of(snapshot)])
  t.strictSame(read, [
    [
      'db.client.connection.count',
      false,
      [
        { value: 1, state: 'idle' },
        { value: 4, state: 'used' },
      ],
    ],
    ['db.client.connection.max', false, [{ value: 6 }]],
    ['db.client.connection.idle.max', false, [{ value: 4 }]],
    ['db.client.connection.pending_requests', false, [{ value: 2 }]],
    ['db.client.connection.timeouts', true, [{ value: 3 }]],
    ['fastify_request_db.commits', true, [{ value: 13 }]],
    ['fastify_request_db.rollbacks', true, [{ value: 14 }]],
    ['fastify_request_db.failed_commits', true, [{ value: 15 }]],
    ['fastify_request_db.hand_overs', true, [{ value: 2 }]],
    ['fastify_request_db.saturated', true, [{ value: 4 }]],
    ['fastify_request_db.invalidated', true, [{ value: 9 }]],
    ['fastify_request_db.failed_connects', true, [{ value: 6 }]],
  ])
})

test('the durations of one pool are told in seconds until that is stopped', async (t) => {
  const told: unknown[] = []
  const stop = listenToDurations(pool, (duration, seconds) => told.push([duration, seconds]))
  const publish = () => {
    channels.connect.publish({ ...common, pid: 1, millis: 20, error: undefined })
    channels.connect.publish({ ...common, pid: undefined, millis: 30, error: new Error('refused') })
    channels.checkout.publish({ ...common, pid: 1, who, waitedMillis: 5, isHandedOver: false })
    const held = { heldMillis: 250, busyMillis: 200, statements: 1, isHandedOver: false }
    channels.checkin.publish({ ...common, pid: 1, who, ...held })
    channels.checkin.publish({ ...common, pool: { ...pool }, pid: 1, who, ...held })
  }
  publish()
  t.strictSame(told, [
    ['createTime', 0.02],
    ['waitTime', 0.005],
    ['useTime', 0.25],
  ])
  stop()
  publish()
  t.equal(told.length, 3)
  t.ok(Object.values(DURATIONS).every(({ unit }) => unit === 's'))
})

test('each verdict is a cause, and so is none', async (t) => {
  t.equal(CAUSES.length, 9)
  t.ok(CAUSES.includes('hold-and-wait') && CAUSES.includes('none'))
})
