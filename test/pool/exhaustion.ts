import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { buildHoldableApp } from '../support/holdable-app.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { watchPeak } from '../support/peak.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const TIMEOUT = { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' }

test('there are never more backends than size and overflow, and the overflow is closed on return', async (t) => {
  const application = 'overflowing'
  const url = new URL(database.connectionString)
  url.searchParams.set('application_name', application)
  const pool = { size: 2, maxOverflow: 1 }
  const app = await buildApp(t, database, { connectionString: url.href, pool }, (app) => {
    app.get('/', ({ db }) => sql`select pg_sleep(0.005)`.execute(db))
    app.get('/fails', ({ db }) => sql`select 1/0`.execute(db))
  })
  const peak = await watchPeak(t, database, application)
  for (let round = 0; round < 5; round++) {
    const answers = await Promise.all(Array.from({ length: 30 }, (_, i) => app.inject(i % 5 === 0 ? '/fails' : '/')))
    t.equal(answers.filter(({ statusCode }) => statusCode === 200).length, 24)
  }
  await eventually(async () => (await database.backends(application)).length === 2)
  t.equal(await peak.stop(), 3)
  t.match(app.db.snapshot(), { open: 2, idle: 2, overflow: 0 })
  const { opened, closed } = app.db.snapshot().totals
  t.equal(opened - closed, 2)
})

test('not even while connections are replaced for their age', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const application = 'aging'
  const url = new URL(proxy.connectionString)
  url.searchParams.set('application_name', application)
  const four = gate()
  let inside = 0
  const pool = { size: 4, recycleMillis: 1_800_000, prePing: false as const }
  const clock = takeClock(t)
  const app = await buildApp(t, database, { connectionString: url.href, pool }, (app) => {
    app.get('/', async ({ db }) => {
      await pidOf(db)
      if (++inside === 4) four.open()
      await four.opened
    })
  })
  await Promise.all([1, 2, 3, 4].map(() => app.inject('/')))
  const first = (await database.backends(application)).map(({ pid }) => pid)
  t.equal(first.length, 4)
  // The server hears of the goodbyes late.
  const goodbye = proxy.trap({ from: 'client', type: 'X' }, 'hold', { times: 4 })
  clock.advance(3_600_000)
  const peak = await watchPeak(t, database, application)
  const answers = [1, 2, 3, 4].map(() => app.inject('/'))
  await goodbye.sprung
  t.equal((await database.backends(application)).length, 4)
  t.equal(proxy.sessions.length, 4, 'no new one is opened before the old one is gone')
  goodbye.release()
  for (const answer of answers) t.equal((await answer).statusCode, 200)
  t.equal(await peak.stop(), 4)
  t.match(app.db.snapshot(), { open: 4, idle: 4, totals: { recycled: 4 } })
})

test('an overflow connection is passed on while somebody waits', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, maxOverflow: 1 })
  const [one, other] = [await hold(), await hold()]
  t.match(app.db.snapshot(), { open: 2, overflow: 1, checkedOut: 2 })
  const waiters = [app.inject('/'), app.inject('/'), app.inject('/')]
  await eventually(() => app.db.snapshot().waiting === 3)
  release()
  for (const answer of [one.answer, other.answer, ...waiters]) t.equal((await answer).statusCode, 200)
  t.match(app.db.snapshot().totals, { opened: 2 })
  await eventually(() => app.db.snapshot().open === 1)
  t.match(app.db.snapshot(), { idle: 1, overflow: 0, totals: { closed: 1 } })
})

test('a storm of requests is served in full', async (t) => {
  const { app } = await buildHoldableApp(t, database, { size: 5, maxOverflow: 5 })
  const answers = await Promise.all(Array.from({ length: 300 }, () => app.inject('/')))
  t.ok(answers.every(({ statusCode }) => statusCode === 200))
  t.ok(app.db.snapshot().totals.opened <= 10)
  await eventually(() => app.db.snapshot().open === 5)
})

test('waiters are served in the order in which they came', async (t) => {
  const served: number[] = []
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1 }, (app) => {
    app.get('/tag/:tag', async ({ db, params }) => {
      await pidOf(db)
      served.push(Number((params as { tag: string }).tag))
    })
  })
  const { answer } = await hold()
  const waiters: Promise<unknown>[] = []
  for (let tag = 0; tag < 20; tag++) {
    waiters.push(app.inject(`/tag/${tag}`))
    await eventually(() => app.db.snapshot().waiting === tag + 1)
  }
  release()
  await Promise.all([answer, ...waiters])
  t.strictSame(
    served,
    Array.from({ length: 20 }, (_, tag) => tag),
  )
})

test('who comes in the very moment of a check-in stands behind those who wait', async (t) => {
  const served: string[] = []
  const { app } = await buildHoldableApp(t, database, { size: 1 }, (app) => {
    app.get('/tag/:tag', async ({ db, params }) => {
      await pidOf(db)
      served.push((params as { tag: string }).tag)
    })
  })
  const late: Promise<unknown>[] = []
  await app.db.session(async (db) => {
    await pidOf(db)
    for (const tag of ['first', 'second']) {
      late.push(app.inject(`/tag/${tag}`))
      await eventually(() => app.db.snapshot().waiting === late.length)
    }
    db.afterCommit(() => void late.push(app.inject('/tag/newcomer')))
  })
  late.push(app.inject('/tag/last'))
  await eventually(() => late.length === 4)
  await Promise.all(late)
  t.strictSame(served.slice(0, 2), ['first', 'second'])
  t.equal(served.length, 4)
})

test('more than maxWaiting are refused at once, with the time to come back', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, maxWaiting: 3 })
  const { answer } = await hold()
  const waiters = [app.inject('/'), app.inject('/'), app.inject('/')]
  await eventually(() => app.db.snapshot().waiting === 3)
  const since = performance.now()
  const refusals = await Promise.all([app.inject('/'), app.inject('/')])
  t.ok(performance.now() - since < 200)
  for (const refusal of refusals) {
    t.match(refusal.json(), {
      statusCode: 503,
      code: 'FST_REQUEST_DB_POOL_SATURATED',
      message: /\b3 sessions are waiting/,
    })
    t.match(refusal.headers['retry-after'], /^[1-9]\d*$/)
  }
  t.match(app.db.snapshot(), { waiting: 3, totals: { saturated: 2, timeouts: 0 } })
  release()
  for (const one of [answer, ...waiters]) t.equal((await one).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
})

test('maxWaiting 0 lets nobody wait', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, maxWaiting: 0 })
  const { answer } = await hold()
  t.match((await app.inject('/')).json(), { code: 'FST_REQUEST_DB_POOL_SATURATED' })
  release()
  t.equal((await answer).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
})

test('sessions, statements and pings outside of requests stand in the same queue', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 200 })
  const { answer } = await hold()
  const refused = [
    app.db.session({ name: 'nightly' }, (db) => pidOf(db)),
    app.db.kysely.selectFrom('notes').selectAll().execute(),
    app.db.ping(),
  ].map((one: Promise<unknown>) => t.rejects(one, { code: TIMEOUT.code }))
  await eventually(() => app.db.snapshot().waiting === 3)
  t.strictSame(
    app.db.snapshot().waiters.map(({ method, route }) => ({ method, route })),
    ['nightly', 'kysely', 'ping'].map((route) => ({ method: '', route })),
  )
  await Promise.all(refused)
  release()
  t.equal((await answer).statusCode, 200)
})

test('the snapshot tells who holds and who waits', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1 })
  const { answer } = await hold()
  const waiter = app.inject('/?secret=1')
  await eventually(() => app.db.snapshot().waiting === 1)
  const { holders, waiters } = app.db.snapshot()
  t.match(holders, [{ method: 'GET', route: '/hold', requestId: /./, statements: 1, lastStatement: /pg_backend_pid/ }])
  t.match(waiters, [{ method: 'GET', route: '/', requestId: /./ }])
  release()
  t.equal(Number((await waiter).body), holders[0]?.pid)
  t.equal((await answer).statusCode, 200)
})

test('maxSessionMillis gives the connection of a stuck handler to who waits', async (t) => {
  const options = { pool: { size: 1 }, maxSessionMillis: 200 }
  const forever = gate()
  const app = await buildApp(t, database, options, (app) => {
    app.get('/stuck', async ({ db }) => {
      await add(db, 'never')
      await forever.opened
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  const stuck = app.inject('/stuck')
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.equal((await app.inject('/')).statusCode, 200)
  forever.open()
  t.match((await stuck).json(), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  t.strictSame(await notesIn(database), [])
})
