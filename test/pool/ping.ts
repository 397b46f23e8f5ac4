import { setImmediate as turn } from 'node:timers/promises'
import type { PoolOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, pidOf, terminate, verbs } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

/** An app behind a proxy; `open(n)` opens n connections at a time, and all are idle again after it. */
async function setUp(t: Test, pool: PoolOptions = {}) {
  const clock = takeClock(t)
  const proxy = await startProxy(t, database.connectionString)
  let inside = 0
  let wanted = 0
  let together = gate()
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
    app.get('/together', async ({ db }) => {
      const pid = await pidOf(db)
      if (++inside === wanted) together.open()
      await together.opened
      return pid
    })
    app.post('/', async ({ db }) => {
      await add(db, 'kept')
    })
  })
  const open = async (connections: number): Promise<number[]> => {
    inside = 0
    wanted = connections
    together = gate()
    const answers = await Promise.all(Array.from({ length: connections }, () => app.inject('/together')))
    proxy.clear()
    return answers.map(({ body }) => Number(body))
  }
  return { clock, proxy, app, open }
}

const UNPINGED = [['BEGIN', 'SELECT'], ['COMMIT']]
const PINGED = [[], ...UNPINGED]

test('only what sat idle for longer than idleMillis is pinged', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: { idleMillis: 1000 } })
  await open(1)
  await app.inject('/')
  t.strictSame(verbs(proxy), UNPINGED, 'fresh from its last use')
  clock.advance(900)
  proxy.clear()
  await app.inject('/')
  t.strictSame(verbs(proxy), UNPINGED, 'not long enough')
  clock.advance(1100)
  proxy.clear()
  await app.inject('/')
  t.strictSame(verbs(proxy), PINGED)
  t.equal(proxy.flights[0]?.messages, 'S', 'a bare Sync')
  t.equal(proxy.roundTrips(), 3)
  proxy.clear()
  await app.inject('/')
  t.strictSame(verbs(proxy), UNPINGED, 'it has just been used')
})

test('a connection that was just opened is not pinged, nor one that passes from hand to hand', async (t) => {
  const { proxy, app } = await setUp(t, { size: 1, prePing: { idleMillis: 0 } })
  const answers = await Promise.all([1, 2, 3].map(() => app.inject('/')))
  t.ok(answers.every(({ statusCode }) => statusCode === 200))
  t.strictSame(verbs(proxy), [...UNPINGED, ...UNPINGED, ...UNPINGED])
})

test('prePing false never pings', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: false })
  await open(1)
  clock.advance(3_600_000)
  await app.inject('/')
  t.strictSame(verbs(proxy), UNPINGED)
})

test('a half-open connection is found out by the ping, with all that are as old, and nobody notices', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { size: 3, prePing: { timeoutMillis: 200 } })
  const pids = await open(3)
  proxy.swallow()
  clock.advance(2000)
  const since = performance.now()
  const answer = await app.inject({ method: 'POST', url: '/' })
  const after = performance.now() - since
  t.equal(answer.statusCode, 200)
  t.ok(after > 190 && after < 1200, `after ${after} ms`)
  t.strictSame(await notesIn(database), ['kept'])
  t.match(app.db.snapshot(), {
    open: 1,
    idle: 1,
    totals: { failedPings: 1, invalidated: 3, opened: 4, replays: 0 },
  })
  t.notOk(pids.includes(Number((await app.inject('/')).body)))
  await eventually(() => proxy.sessions.slice(0, 3).every(({ closed }) => closed))
})

test('several requests that meet half-open connections at a time are all served', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { size: 3, prePing: { timeoutMillis: 200 } })
  await open(3)
  proxy.swallow()
  clock.advance(2000)
  const answers = await Promise.all(Array.from({ length: 6 }, () => app.inject('/')))
  t.ok(answers.every(({ statusCode }) => statusCode === 200))
  t.match(app.db.snapshot(), { open: 3, idle: 3, totals: { failedPings: 3, invalidated: 3, opened: 6 } })
})

test('a connection in use when the failure shows is replaced when it comes back', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { size: 2, prePing: { timeoutMillis: 200 } })
  await open(2)
  const inUse = gate<number>()
  const goOn = gate()
  const session = app.db.session(async (db) => {
    inUse.open(await pidOf(db))
    await goOn.opened
    await add(db, 'kept')
  })
  const pid = await inUse.opened
  clock.advance(2000)
  proxy.cut('reset', (recording) => recording.pid !== pid)
  await eventually(() => app.db.snapshot().open === 1)
  await open(1)
  proxy.trap({ from: 'client', type: 'S' }, 'swallow')
  clock.advance(2000)
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal(app.db.snapshot().totals.failedPings, 1)
  goOn.open()
  await session
  t.strictSame(await notesIn(database), ['kept'], 'it is not cut under its user')
  await eventually(() => proxy.sessions.find((recording) => recording.pid === pid)?.closed === true)
  t.match(app.db.snapshot(), { open: 1, totals: { recycled: 1 } })
})

test('a connection that breaks under the ping is replaced at once', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: { timeoutMillis: 30_000 } })
  await open(1)
  proxy.trap({ from: 'client', type: 'S' }, 'reset')
  clock.advance(2000)
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, totals: { failedPings: 1, opened: 2, replays: 0 } })
})

test('a backend killed while it is pinged is replaced at once', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: { timeoutMillis: 30_000 } })
  const [pid] = await open(1)
  const ping = proxy.trap({ from: 'client', type: 'S' }, 'hold')
  clock.advance(2000)
  const answer = app.inject('/')
  await ping.sprung
  await terminate(database, pid!)
  t.equal((await answer).statusCode, 200)
  t.not(Number((await answer).body), pid)
  t.match(app.db.snapshot(), { open: 1, totals: { failedPings: 1, opened: 2 } })
})

test('a connection that breaks between the ping and BEGIN is the case of the replay', async (t) => {
  const { clock, proxy, app, open } = await setUp(t)
  await open(1)
  clock.advance(2000)
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['kept'])
  t.match(app.db.snapshot(), { open: 1, totals: { failedPings: 0, replays: 1 } })
})

test('a server that answers slowly, but in time, is alive', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: { timeoutMillis: 2000 } })
  const [pid] = await open(1)
  proxy.delay(150)
  clock.advance(2000)
  const answer = await app.inject('/')
  t.equal(Number(answer.body), pid)
  t.match(app.db.snapshot(), { open: 1, totals: { failedPings: 0, opened: 1 } })
})

test('an app that computes while a ping is under way does not find the server dead', async (t) => {
  const clock = takeClock(t)
  const pool = { prePing: { idleMillis: 1000, timeoutMillis: 30 } }
  const app = await buildApp(t, database, { pool }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  await app.inject('/')
  for (let i = 0; i < 5; i++) {
    clock.advance(2000)
    const answer = app.inject('/')
    for (let turns = 0; turns < 100 && app.db.snapshot().waiters.length === 0; turns++) await turn()
    t.equal(app.db.snapshot().waiters.length, 1, 'the ping is on its way')
    for (const until = performance.now() + 150; performance.now() < until; );
    t.equal((await answer).statusCode, 200)
  }
  t.match(app.db.snapshot().totals, { failedPings: 0, opened: 1 })
})

test('a hole that also swallows new connections ends in UNAVAILABLE, and heals', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { timeoutMillis: 300, prePing: { timeoutMillis: 100 } })
  await open(2)
  proxy.swallow({ sockets: 'all' })
  clock.advance(2000)
  t.match((await app.inject('/')).json(), { code: 'FST_REQUEST_DB_UNAVAILABLE' })
  t.match(app.db.snapshot(), { open: 0, totals: { failedPings: 1, failedConnects: 1 } })
  proxy.restore()
  t.equal((await app.inject('/')).statusCode, 200)
})

test('the one that was used last is used next, so that the others may grow old', async (t) => {
  const { app, open } = await setUp(t, { size: 3 })
  await open(3)
  const pids = new Set<string>()
  for (let i = 0; i < 10; i++) pids.add((await app.inject('/')).body)
  t.equal(pids.size, 1)
})

test('fastify.db.ping() tells the round trip, and of a silent server in time', async (t) => {
  const { proxy, app, open } = await setUp(t, { prePing: { timeoutMillis: 200 } })
  await open(1)
  proxy.delay(20)
  const millis = await app.db.ping()
  t.ok(millis >= 38 && millis < 1000, `${millis} ms`)
  t.strictSame(verbs(proxy), [[]])
  proxy.delay(0)
  proxy.swallow()
  await t.rejects(app.db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE', statusCode: 503 })
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0 })
  t.ok((await app.db.ping()) > 0)
})

test('closing while a ping is unanswered opens nothing new and leaves nothing open', async (t) => {
  const { clock, proxy, app, open } = await setUp(t, { prePing: { timeoutMillis: 30_000 } })
  await open(2)
  const ping = proxy.trap({ from: 'client', type: 'S' }, 'swallow')
  clock.advance(2000)
  const answer = app.inject('/')
  await ping.sprung
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 1500)
  t.match((await answer).json(), { statusCode: 503, code: 'FST_REQUEST_DB_POOL_CLOSED' })
  t.equal(proxy.sessions.length, 2, 'no connection is opened any more')
  await eventually(() => proxy.sessions.every(({ closed }) => closed))
  await eventually(async () => (await database.backends()).length === 0)
})

test('closing with half-open idle connections ends in time', async (t) => {
  const { proxy, app, open } = await setUp(t)
  await open(2)
  proxy.swallow()
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 2000)
  await eventually(() => proxy.sessions.every(({ closed }) => closed))
})
