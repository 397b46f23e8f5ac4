import type { PoolOptions } from '../../../lib/index.ts'
import { type Borrower, borrow, borrowMany, comesTo, counts, endAll, isSound } from '../../support/borrower.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { pidOf } from '../../support/notebook.ts'
import { watchPeak } from '../../support/peak.ts'
import { buildPooled } from '../../support/pooled.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/*
 * The scenarios of SQLAlchemy's test/engine/test_pool.py. Those that do not apply:
 * - thread-local pools, weak references and garbage collection: a session ends with its request, not with its last reference;
 * - SingletonThreadPool, StaticPool, NullPool, AssertionPool, pools without a limit: there is one kind of pool;
 * - recreate(), detach(), creators, and events that replace or refuse a connection: a pool is made once, and keeps what it opens;
 * - reset_on_return 'commit', None, and reset agents: what is not committed is rolled back, always.
 */

const database = await createDatabase(t, { sql: NOTES })
const TIMEOUT = { code: 'FST_REQUEST_DB_POOL_TIMEOUT' }
const UNAVAILABLE = { code: 'FST_REQUEST_DB_UNAVAILABLE' }

const setUp = (t: Test, pool: PoolOptions, options?: { connectMillis: number }) =>
  buildPooled(t, database, pool, options)

test('the counts follow the connections up to size and overflow, and down again', async (t) => {
  const { app } = await setUp(t, { size: 3, maxOverflow: 3 })
  const held: Borrower[] = []
  for (const expected of [
    [1, 0, 1, 0, 0],
    [2, 0, 2, 0, 0],
    [3, 0, 3, 0, 0],
    [4, 0, 4, 1, 0],
    [5, 0, 5, 2, 0],
    [6, 0, 6, 3, 0],
  ]) {
    held.push(...(await borrowMany(app, 1)))
    t.strictSame(counts(app.db.snapshot()), expected)
  }
  await endAll(held.splice(0, 3))
  await comesTo(app, [3, 0, 3, 0, 0])
  await endAll(held.splice(0))
  await comesTo(app, [3, 3, 0, 0, 0])
  held.push(...(await borrowMany(app, 2)))
  await comesTo(app, [3, 1, 2, 0, 0])
  await endAll(held)
  await isSound(t, app)
})

test('five times four sessions at once close two connections of the overflow each time, and no other', async (t) => {
  const { app } = await setUp(t, { size: 2, maxOverflow: 2 })
  const pids = new Set<number>()
  for (let round = 0; round < 5; round++) {
    const held = await borrowMany(app, 4)
    for (const { got } of held) pids.add(await got)
    await endAll(held)
    await comesTo(app, [2, 2, 0, 0, 0])
  }
  t.equal(pids.size, 12)
  t.match(app.db.snapshot().totals, { opened: 12, closed: 10, recycled: 0, invalidated: 0 })
})

for (const maxOverflow of [0, 5]) {
  test(`forty sessions ten times each, with connections that open slowly, stay within an overflow of ${maxOverflow}`, async (t) => {
    const { app, proxy, application } = await setUp(t, { size: 3, maxOverflow, timeoutMillis: 60 })
    proxy.delay({ toServer: 5 })
    const peak = await watchPeak(t, database, application)
    let served = 0
    let refused = 0
    const work = async () => {
      for (let i = 0; i < 10; i++) {
        await app.db.session(pidOf).then(
          () => served++,
          (error) => {
            refused++
            t.match(error, TIMEOUT)
          },
        )
      }
    }
    await Promise.all(Array.from({ length: 40 }, work))
    const most = await peak.stop()
    // One more may be there for the report of a refusal, which has a connection of its own.
    t.ok(most <= 3 + maxOverflow + 1, `${most} at a time`)
    t.strictSame([served + refused, app.db.snapshot().totals.timeouts], [400, refused])
    await isSound(t, app)
  })
}

test('of ten that ask while connections open slowly, those that get none have waited in full', async (t) => {
  const { app, proxy } = await setUp(t, { size: 2, maxOverflow: 1, timeoutMillis: 400 })
  proxy.delay({ toServer: 10 })
  const waits: number[] = []
  const all = Array.from({ length: 10 }, () => {
    const since = performance.now()
    const one = borrow(app)
    one.got.catch((error) => {
      t.match(error, TIMEOUT)
      waits.push(performance.now() - since)
    })
    return one
  })
  await eventually(() => waits.length === 7, { withinMillis: 5000 })
  t.ok(Math.min(...waits) >= 400, `never earlier: ${waits.map(Math.round)}`)
  t.strictSame(counts(app.db.snapshot()), [3, 0, 3, 1, 0])
  t.equal(
    (await Promise.allSettled(all.map((one) => one.end()))).filter(({ status }) => status === 'fulfilled').length,
    3,
  )
  await isSound(t, app)
})

for (const maxOverflow of [0, 1]) {
  test(`hundreds of waits that end in the very moment of a return lose nothing, with an overflow of ${maxOverflow}`, async (t) => {
    const { app, proxy } = await setUp(t, { size: 1, maxOverflow, timeoutMillis: 4 })
    const places = 1 + maxOverflow
    let refused = 0
    const rounds = places === 1 ? 500 : 150
    for (let round = 0; round < rounds; round++) {
      const held = await borrowMany(app, places)
      const waiters = [borrow(app), borrow(app)]
      // The stimulus, not a wait: the return falls somewhere around the end of the wait.
      await new Promise((resolve) => setTimeout(resolve, round % 7))
      await endAll(held)
      for (const waiter of waiters) {
        const outcome = await waiter.got.then(
          () => waiter.end(),
          (error) => error,
        )
        if (outcome === undefined) continue
        refused++
        if (outcome.code !== TIMEOUT.code) t.match(outcome, TIMEOUT, `round ${round}`)
      }
      await eventually(() => app.db.snapshot().checkedOut === 0 && app.db.snapshot().waiting === 0)
      // A place is taken until the server has hung up.
      await eventually(
        () => app.db.snapshot().idle === 1 && proxy.sessions.filter(({ closed }) => !closed).length === 1,
      )
    }
    const { totals } = app.db.snapshot()
    t.equal(totals.timeouts, refused)
    t.equal(totals.invalidated, 0)
    t.equal(totals.commits, rounds * (places + 2) - refused)
    t.ok(refused > 0 && refused < rounds * 2, `${refused} were refused`)
    await isSound(t, app)
  })
}

test('a connection of the overflow that cannot be opened leaves the overflow as it was', async (t) => {
  const { app, proxy } = await setUp(t, { size: 2, maxOverflow: 3 })
  const held = await borrowMany(app, 3)
  proxy.failStartup('53300', 4)
  for (let i = 0; i < 4; i++) {
    await t.rejects(borrow(app).got, UNAVAILABLE)
    t.strictSame(counts(app.db.snapshot()), [3, 0, 3, 1, 0])
  }
  held.push(...(await borrowMany(app, 2)))
  t.strictSame(counts(app.db.snapshot()), [5, 0, 5, 3, 0])
  await endAll(held)
  t.equal(app.db.snapshot().totals.failedConnects, 4)
  await isSound(t, app)
})

test('a connection that cannot be opened gives its place to who waits, while all others are held', async (t) => {
  const { app, proxy } = await setUp(t, { size: 1, maxOverflow: 1 })
  const held = await borrowMany(app, 1)
  const startup = proxy.trap({ from: 'client', type: 'startup' }, 'hold')
  const unlucky = borrow(app)
  const { id } = await startup.sprung
  const waiter = borrow(app)
  await comesTo(app, [1, 0, 1, 0, 1])
  proxy.cut('reset', (recording) => recording.id === id)
  await t.rejects(unlucky.got, UNAVAILABLE)
  t.not(await waiter.got, await held[0]!.got)
  t.strictSame(counts(app.db.snapshot()), [2, 0, 2, 1, 0])
  await endAll([...held, waiter])
  await isSound(t, app)
})

test('a connection of the overflow that hangs while it opens keeps nobody waiting, and its place is used again', async (t) => {
  const { app, proxy } = await setUp(t, { size: 2, maxOverflow: 3 }, { connectMillis: 600 })
  const held = await borrowMany(app, 2)
  proxy.silenceStartup(1)
  const since = performance.now()
  const hanging = borrow(app)
  await eventually(() => proxy.sessions.length === 3)
  held.push(...(await borrowMany(app, 2)))
  const waiter = borrow(app)
  t.strictSame(counts(app.db.snapshot()), [4, 0, 4, 2, 1])
  await t.rejects(hanging.got, UNAVAILABLE)
  t.ok(performance.now() - since >= 600)
  await waiter.got
  t.strictSame(counts(app.db.snapshot()), [5, 0, 5, 3, 0])
  await endAll([...held, waiter])
  await isSound(t, app)
})
