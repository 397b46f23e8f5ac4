import type { FastifyInstance } from 'fastify'
import type { PoolOptions } from '../../../lib/index.ts'
import { type Borrower, borrow, borrowMany, comesTo, counts, endAll, isSound } from '../../support/borrower.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { pidOf, terminate } from '../../support/notebook.ts'
import { watchPeak } from '../../support/peak.ts'
import { buildPooled } from '../../support/pooled.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/*
 * The scenarios of SQLAlchemy's test/engine/test_pool.py, second part: connections that are invalid, expired or dead, and what
 * takes their place. What does not apply is said in the first part, sqlalchemy-pool.ts.
 */

const database = await createDatabase(t, { sql: NOTES })
const UNAVAILABLE = { code: 'FST_REQUEST_DB_UNAVAILABLE' }
const setUp = (t: Test, pool: PoolOptions) => buildPooled(t, database, pool)

/** That many connections, opened one after the other and idle. */
async function fill(app: FastifyInstance, count: number): Promise<void> {
  await endAll(await borrowMany(app, count))
  await eventually(() => app.db.snapshot().idle === count)
}

for (const maxOverflow of [0, 3]) {
  for (const how of ['the server', 'a reset'] as const) {
    test(`who waits is served when a held connection is ended by ${how}, with an overflow of ${maxOverflow}`, async (t) => {
      const { app, proxy } = await setUp(t, { size: 2, maxOverflow })
      const held = await borrowMany(app, 2 + maxOverflow)
      const waiters = Array.from({ length: 5 }, () => borrow(app))
      await eventually(() => app.db.snapshot().waiting === 5)
      const [victim, ...others] = held as [Borrower, ...Borrower[]]
      const pid = await victim.got
      if (how === 'the server') await terminate(database, pid)
      else proxy.cut('reset', (recording) => recording.pid === pid)
      await eventually(() => app.db.snapshot().holders.every((holder) => holder.pid !== pid))
      await t.rejects(victim.end(), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
      for (const waiter of waiters) {
        t.not(await waiter.got, pid)
        await waiter.end()
      }
      await endAll(others)
      t.match(app.db.snapshot().totals, { failedCommits: 1, timeouts: 0 })
      await isSound(t, app)
    })
  }
}

test('five who wait for the one connection are all served by the one that replaces it', async (t) => {
  const { app } = await setUp(t, { size: 1 })
  const [held] = (await borrowMany(app, 1)) as [Borrower]
  const waiters = Array.from({ length: 5 }, () => borrow(app))
  await comesTo(app, [1, 0, 1, 0, 5])
  await terminate(database, await held.got)
  await eventually(() => app.db.snapshot().totals.invalidated === 1)
  await t.rejects(held.end(), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  const pids = new Set<number>()
  for (const waiter of waiters) {
    pids.add(await waiter.got)
    await waiter.end()
  }
  t.equal(pids.size, 1)
  t.match(app.db.snapshot().totals, { opened: 2, invalidated: 1, commits: 5 })
  await isSound(t, app)
})

for (const why of ['was killed', 'has expired', 'fails its ping'] as const) {
  test(`the only connection ${why} while the server takes no new ones: the places are all there afterwards`, async (t) => {
    const prePing = why === 'fails its ping' && { idleMillis: 1000, timeoutMillis: 200 }
    const clock = takeClock(t)
    const { app, proxy } = await setUp(t, { size: 1, maxOverflow: 2, prePing, recycleMillis: 600_000 })
    await fill(app, 1)
    if (why === 'was killed') proxy.cut('end')
    if (why === 'has expired') clock.advance(700_000)
    if (why === 'fails its ping') {
      clock.advance(5000)
      proxy.swallow()
    }
    await proxy.refuse()
    for (let i = 0; i < 3; i++) {
      await t.rejects(borrow(app).got, UNAVAILABLE)
      t.strictSame(counts(app.db.snapshot()), [0, 0, 0, 0, 0])
    }
    t.equal(app.db.snapshot().totals.failedConnects, 3)
    await proxy.accept()
    const held = await borrowMany(app, 3)
    t.strictSame(counts(app.db.snapshot()), [3, 0, 3, 2, 0])
    await endAll(held)
    t.equal(app.db.snapshot().totals.opened, 4)
    await isSound(t, app)
  })
}

test('fifteen connections that break at different moments are each replaced once', async (t) => {
  const { app, proxy } = await setUp(t, { size: 15 })
  const held = await borrowMany(app, 15)
  const pids = await Promise.all(held.map(({ got }) => got))
  await endAll(held.splice(0, 8))
  await comesTo(app, [15, 8, 7, 0, 0])
  for (const pid of pids.slice(8)) {
    proxy.cut(pid % 2 === 0 ? 'end' : 'reset', (recording) => recording.pid === pid)
    await new Promise((resolve) => setTimeout(resolve, pid % 5))
  }
  for (const one of held) await t.rejects(one.end(), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  const again = await borrowMany(app, 15)
  for (const { got } of again) t.notOk(pids.includes(await got))
  t.equal(app.db.snapshot().totals.opened, 30)
  await endAll(again)
  await isSound(t, app)
})

test('forty sessions on a pool whose connections have all expired, slow to close, open no more than there are places', async (t) => {
  const clock = takeClock(t)
  const { app, proxy, application } = await setUp(t, { size: 4, maxOverflow: 4, recycleMillis: 60_000 })
  for (let round = 0; round < 3; round++) {
    await fill(app, 4)
    clock.advance(70_000)
    proxy.delay({ toServer: 20 })
    const peak = await watchPeak(t, database, application)
    await Promise.all(Array.from({ length: 40 }, () => app.db.session(pidOf)))
    t.ok((await peak.stop()) <= 8)
    proxy.delay(0)
    await comesTo(app, [4, 4, 0, 0, 0])
    t.equal(app.db.snapshot().totals.recycled, 4 * (round + 1))
  }
  await isSound(t, app)
})
