import type { PoolOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, isGone, notesIn, pidOf, verbs } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

async function setUp(t: Test, pool: PoolOptions) {
  const clock = takeClock(t)
  const app = await buildApp(t, database, { pool: { prePing: false, ...pool } }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  const pid = async () => Number((await app.inject('/')).body)
  return { clock, app, pid }
}

/** Math.random in the test's hand, until the end of `t`. */
function rollDice(t: Test, roll: number): void {
  const { random } = Math
  Math.random = () => roll
  t.teardown(() => {
    Math.random = random
  })
}

test('a connection that has grown old is replaced at its next check-out', async (t) => {
  const { clock, app, pid } = await setUp(t, { recycleMillis: 60_000 })
  const first = await pid()
  clock.advance(53_000)
  t.equal(await pid(), first)
  clock.advance(14_000)
  t.not(await pid(), first)
  t.ok(await isGone(database, first))
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { opened: 2, recycled: 1, invalidated: 0, closed: 0 } })
})

for (const { roll, dies, lives } of [
  { roll: 0, lives: 53_900, dies: 54_100 },
  { roll: 0.5, lives: 59_900, dies: 60_100 },
  { roll: 0.9999, lives: 65_800, dies: 66_100 },
]) {
  test(`the age is recycleMillis give or take 10 %: where the die shows ${roll}`, async (t) => {
    rollDice(t, roll)
    const { clock, pid } = await setUp(t, { recycleMillis: 60_000 })
    const first = await pid()
    clock.advance(lives)
    t.equal(await pid(), first)
    clock.advance(dies - lives)
    t.not(await pid(), first)
  })
}

test('it is not cut under its user, but replaced at check-in', async (t) => {
  const { clock, app } = await setUp(t, { recycleMillis: 60_000 })
  let pid = 0
  await app.db.session(async (db) => {
    pid = await pidOf(db)
    clock.advance(3_600_000)
    await add(db, 'kept')
    t.equal(await pidOf(db), pid)
  })
  t.strictSame(await notesIn(database), ['kept'])
  await eventually(() => isGone(database, pid))
  t.match(app.db.snapshot(), { open: 0, idle: 0, totals: { recycled: 1 } })
})

test('who waits for a connection that is replaced at check-in gets a fresh one', async (t) => {
  const { clock, app, pid } = await setUp(t, { size: 1, recycleMillis: 60_000 })
  const first = await pid()
  let waiter: Promise<number> | undefined
  await app.db.session(async (db) => {
    t.equal(await pidOf(db), first)
    waiter = pid()
    await eventually(() => app.db.snapshot().waiting === 1)
    clock.advance(70_000)
  })
  t.not(await waiter, first)
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { recycled: 1, opened: 2, timeouts: 0 } })
})

test('the goodbye is said in good order', async (t) => {
  const clock = takeClock(t)
  const proxy = await startProxy(t, database.connectionString)
  const pool = { recycleMillis: 60_000, prePing: false as const }
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  await app.inject('/')
  clock.advance(70_000)
  await app.inject('/')
  await eventually(() => proxy.sessions[0]?.closed === true)
  t.match(proxy.sessions[0], { terminated: true })
  t.strictSame(verbs(proxy), [['BEGIN', 'SELECT'], ['COMMIT'], ['BEGIN', 'SELECT'], ['COMMIT']])
})

test('recycleMillis false never replaces a connection, and idle ones are kept for good', async (t) => {
  const { clock, app } = await setUp(t, { size: 2, recycleMillis: false })
  const both = gate()
  let inside = 0
  const take = () =>
    app.db.session(async (db) => {
      const pid = await pidOf(db)
      if (++inside % 2 === 0) both.open()
      await both.opened
      return pid
    })
  const pids = await Promise.all([take(), take()])
  clock.advance(365 * 24 * 3_600_000)
  t.match(app.db.snapshot(), { open: 2, idle: 2 })
  t.ok(pids.includes(await app.db.session(pidOf)))
  t.match(app.db.snapshot().totals, { opened: 2, recycled: 0, closed: 0 })
})

test('idle connections are not dropped after some seconds as in pg.Pool', async (t) => {
  const { clock, app, pid } = await setUp(t, {})
  const first = await pid()
  clock.advance(11_000)
  t.equal(app.db.snapshot().idle, 1)
  t.equal(await pid(), first)
})

test('an administrator who sets the clock changes nothing', async (t) => {
  const { now } = Date
  t.teardown(() => {
    Date.now = now
  })
  const pool = { size: 1, recycleMillis: 60_000, timeoutMillis: 200 }
  const app = await buildApp(t, database, { pool }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  const first = (await app.inject('/')).body
  for (const shift of [-3_600_000, 3_600_000]) {
    Date.now = () => now() + shift
    t.equal((await app.inject('/')).body, first, 'it is no older')
    await app.db.session(async (db) => {
      await pidOf(db)
      const since = performance.now()
      t.match((await app.inject('/')).json(), { code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
      const waited = performance.now() - since
      t.ok(waited >= 200 && waited < 1000, `waited ${waited} ms`)
      const [holder] = app.db.snapshot().holders
      t.ok(holder!.heldMillis >= 200 && holder!.heldMillis < 5000)
    })
  }
  t.match(app.db.snapshot().totals, { opened: 1, recycled: 0, failedPings: 0 })
})
