import { sql } from 'kysely'
import type { PoolOptions, RequestDbOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { type Borrower, borrow, borrowMany, endAll } from '../../support/borrower.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { holds, inBothModes } from '../../support/modes.ts'
import { add, pidOf, terminate, verbs } from '../../support/notebook.ts'
import type { Handler } from '../../support/one-route.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/*
 * The scenarios of SQLAlchemy's test/engine/test_reconnect.py. Those that do not apply:
 * - dialects, their initialisation on the first connect, and error texts that mean a disconnect: there is one driver, and a
 *   connection is dead when its socket is;
 * - recipes that execute a statement again behind the app's back: only a first flight is ever sent again;
 * - hibernation of an engine between a failed and the next use, reentrant executes: a session asks the pool anew each time.
 */

const database = await createDatabase(t, { sql: NOTES })
const LOST = { code: 'FST_REQUEST_DB_CONNECTION_LOST' }
const UNAVAILABLE = { code: 'FST_REQUEST_DB_UNAVAILABLE' }
const PING = { idleMillis: 1000, timeoutMillis: 300 }

/** An app behind a proxy whose route POST / is `handler`. The tests say when a connection has been idle for too long. */
async function setUp(t: Test, pool: PoolOptions, handler: Handler = () => 'ok', options: RequestDbOptions = {}) {
  const clock = takeClock(t)
  const proxy = await startProxy(t, database.connectionString)
  const all = { connectionString: proxy.connectionString, pool: { prePing: PING, ...pool }, ...options }
  const app = await buildApp(t, database, all, (app) => {
    app.post('/', async (request, reply) => handler(request.db, request, reply))
  })
  const post = () => app.inject({ method: 'POST', url: '/' })
  /** That many idle connections, which will be pinged before they are used. */
  const stale = async (count: number) => {
    const pids = await endAll(await borrowMany(app, count))
    await eventually(() => app.db.snapshot().idle === count)
    clock.advance(5000)
    proxy.clear()
    return pids
  }
  return { app, proxy, clock, post, stale }
}

const pings = (flights: string[][]) => flights.filter((flight) => flight.length === 0).length

test('neither a first connection nor one that replaces a dead one is pinged', async (t) => {
  const { app, proxy, stale } = await setUp(t, { size: 2 })
  await endAll(await borrowMany(app, 2))
  t.equal(pings(verbs(proxy)), 0)
  await stale(2)
  proxy.swallow()
  await endAll(await borrowMany(app, 1))
  t.equal(pings(verbs(proxy)), 1, 'the dead one was asked')
  t.strictSame(verbs(proxy).slice(1), [['BEGIN', 'SELECT'], ['COMMIT']], 'the new one was not')
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { failedPings: 1, invalidated: 2, opened: 3 } })
})

test('a failed ping replaces what is older, idle or held, and nothing that is younger', async (t) => {
  const { app, proxy, stale } = await setUp(t, { size: 4 })
  const pids = await stale(3)
  // The first is asked and answers; its session holds it while another finds a dead one.
  const held = borrow(app)
  const older = await held.got
  proxy.trap({ from: 'client', type: 'S' }, 'swallow')
  const finder = borrow(app)
  const younger = await finder.got
  t.notOk(pids.includes(younger))
  t.match(app.db.snapshot(), { open: 2, idle: 0, checkedOut: 2, totals: { failedPings: 1, invalidated: 2 } })
  await endAll([held, finder])
  await eventually(() => app.db.snapshot().idle === 1)
  t.match(app.db.snapshot().totals, { recycled: 1, opened: 4 })
  const [again, another] = (await borrowMany(app, 2)) as [Borrower, Borrower]
  t.strictSame([await again.got, pids.includes(await another.got)], [younger, false])
  t.not(older, younger)
  await endAll([again, another])
})

test('while the server is gone each session is told so, and the first after its return is served', async (t) => {
  const { app, proxy, stale } = await setUp(t, { size: 3 })
  await stale(3)
  proxy.swallow()
  await proxy.refuse()
  for (let i = 0; i < 3; i++) {
    await t.rejects(borrow(app).got, UNAVAILABLE)
    t.match(app.db.snapshot(), { open: 0, idle: 0, checkedOut: 0, waiting: 0 })
  }
  t.match(app.db.snapshot().totals, { failedPings: 1, invalidated: 3, failedConnects: 3, opened: 3 })
  await proxy.accept()
  await endAll(await borrowMany(app, 3))
  t.match(app.db.snapshot().totals, { failedPings: 1, invalidated: 3, failedConnects: 3, opened: 6 })
})

test('many sessions at a time that find the pool dead are all served, and each dead connection is asked once', async (t) => {
  const { app, proxy, stale } = await setUp(t, { size: 5 })
  const pids = await stale(5)
  proxy.swallow()
  const found = await Promise.all(Array.from({ length: 20 }, () => app.db.session(pidOf)))
  t.notOk(found.some((pid) => pids.includes(pid)))
  const { totals, idle } = app.db.snapshot()
  t.equal(pings(verbs(proxy)), 5)
  t.match(totals, { failedPings: 5, invalidated: 5, replays: 0, timeouts: 0, failedConnects: 0 })
  t.ok(idle <= 5 && totals.opened <= 10)
})

test('those who wait behind a ping that fails are served by what replaces it', async (t) => {
  const { app, proxy, stale } = await setUp(t, { size: 1 })
  await stale(1)
  proxy.swallow()
  const asked = Array.from({ length: 6 }, () => borrow(app))
  await eventually(() => app.db.snapshot().waiting === 5)
  const pids = new Set(await Promise.all(asked.map((one) => one.got.finally(() => one.end()))))
  t.equal(pids.size, 1)
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { failedPings: 1, opened: 2, commits: 7 } })
})

for (const how of ['end', 'reset'] as const) {
  test(`a connection that is closed (${how}) under three sessions fails each of them once, and is not found again`, async (t) => {
    const { app, proxy } = await setUp(t, { size: 3, prePing: false })
    const held = await borrowMany(app, 3)
    const waiters = Array.from({ length: 4 }, () => borrow(app))
    proxy.cut(how)
    await eventually(() => app.db.snapshot().totals.invalidated === 3)
    for (const one of held) {
      await t.rejects(pidOf(one.db()), LOST)
      await t.rejects(one.end(), LOST)
    }
    await Promise.all(waiters.map((one) => one.got.finally(() => one.end())))
    t.match(app.db.snapshot().totals, { opened: 6, invalidated: 3, failedPings: 0, replays: 0, timeouts: 0 })
    await endAll(await borrowMany(app, 3))
    t.equal(app.db.snapshot().totals.opened, 6)
  })
}

inBothModes(database, 'a session that loses two connections is usable after each rollback', async (t, commitOn) => {
  const lost: unknown[] = []
  const handler: Handler = async (db) => {
    for (const note of ['first', 'second']) {
      await add(db, note)
      await terminate(database, await pidOf(db))
      lost.push(await add(db, `${note} again`).catch((error) => error.code))
      lost.push(await add(db, `${note} once more`).catch((error) => error.code))
      t.equal(db.state, 'failed')
      await db.rollback()
      t.equal(db.state, 'idle')
    }
    await add(db, 'third')
    return 'kept'
  }
  const { app, post } = await setUp(t, { size: 1 }, handler, { commitOn })
  t.equal((await post()).statusCode, 200)
  t.strictSame(lost, [LOST.code, LOST.code, LOST.code, LOST.code])
  await holds(t, database, ['third'])
  t.match(app.db.snapshot().totals, { opened: 3, invalidated: 2, commits: 1, replays: 0 })
})

inBothModes(
  database,
  'commit() of a lost transaction is refused, and what follows is a transaction anew',
  async (t, commitOn) => {
    const handler: Handler = async (db) => {
      await add(db, 'lost')
      await terminate(database, await pidOf(db))
      await eventually(() => db.state === 'failed')
      await t.rejects(db.commit(), LOST)
      t.equal(db.state, 'idle')
      await add(db, 'kept')
      await db.commit()
      await add(db, 'lost as well')
      await terminate(database, await pidOf(db))
      await t.rejects(add(db, 'never'), LOST)
      throw new Error('mine')
    }
    const { app, post } = await setUp(t, { size: 1 }, handler, { commitOn })
    t.match((await post()).json(), { message: 'mine' })
    t.match(app.db.snapshot().totals, { commits: 1, opened: 2, invalidated: 2 })
    await holds(t, database, ['kept'])
  },
)

inBothModes(
  database,
  'where the pool is of one, the handler of a lost connection can write elsewhere at once',
  async (t, commitOn) => {
    const handler: Handler = async (db) => {
      await add(db, 'lost')
      const dead = await pidOf(db)
      await terminate(database, dead)
      await add(db, 'lost too').catch(() => {})
      await app.db.session(async (other) => {
        t.not(await pidOf(other), dead)
        await add(other, 'audit')
      })
      return 'no success'
    }
    const { app, post } = await setUp(t, { size: 1, timeoutMillis: 2000 }, handler, { commitOn })
    const answer = await post()
    t.match(answer.json(), LOST)
    t.equal(answer.statusCode, 503)
    await holds(t, database, ['audit'])
  },
)

for (const how of ['end', 'reset', 'swallow'] as const) {
  inBothModes(
    database,
    `a connection that is lost (${how}) while rows are read ends the reading`,
    async (t, commitOn) => {
      let read = 0
      const handler: Handler = async (db) => {
        await add(db, 'lost')
        const numbers = db.withTables<{ numbers: { n: number } }>()
        const rows = numbers.selectFrom(sql<{ n: number }>`generate_series(1, 100000)`.as('n')).selectAll().stream(100)
        for await (const _row of rows) {
          if (read++ === 250) {
            if (how === 'swallow') proxy.swallow()
            else proxy.cut(how)
          }
        }
        return 'all'
      }
      const options = { commitOn, maxSessionMillis: 600, settleTimeoutMillis: 500 }
      const { app, proxy, post } = await setUp(t, { size: 1 }, handler, options)
      const answer = post()
      t.equal((await answer).json().code, LOST.code)
      t.ok(read < 100_000)
      t.equal(await app.db.session(async (db) => db.state), 'idle')
      t.ok(await app.db.session(pidOf))
      t.match(app.db.snapshot(), { open: 1, totals: { opened: 2, invalidated: 1, replays: 0 } })
      await eventually(async () => (await database.backends()).every(({ state }) => state !== 'idle in transaction'))
      await holds(t, database, [])
    },
  )
}

inBothModes(
  database,
  'without pings a server that has gone is noticed by its closing, and who waits gets word',
  async (t, commitOn) => {
    const reached = gate()
    const goOn = gate()
    const handler: Handler = async (db) => {
      await add(db, 'lost')
      reached.open()
      await goOn.opened
      await add(db, 'lost too')
    }
    const { app, proxy, post } = await setUp(t, { size: 1, prePing: false }, handler, { commitOn })
    const first = post()
    await reached.opened
    const waiters = [post(), post(), post()]
    await eventually(() => app.db.snapshot().waiting === 3)
    await proxy.refuse()
    proxy.cut('end')
    for (const waiter of waiters) t.match((await waiter).json(), UNAVAILABLE)
    goOn.open()
    t.match((await first).json(), LOST)
    t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0, totals: { failedConnects: 3, invalidated: 1 } })
    await proxy.accept()
    await app.db.session((db) => add(db, 'back'))
    await holds(t, database, ['back'])
  },
)

test('errors of statements are no disconnects: the connection stays', async (t) => {
  const { app } = await setUp(t, { size: 1 })
  const [pid] = await endAll(await borrowMany(app, 1))
  for (const text of [
    'select 1/0',
    'select no_such_column',
    'select pg_cancel_backend(pg_backend_pid()), pg_sleep(1)',
  ]) {
    await t.rejects(app.db.session((db) => sql.raw(text).execute(db)))
    t.equal(await app.db.session(pidOf), pid)
  }
  await t.rejects(
    app.db.session((db) => sql`select pg_terminate_backend(pg_backend_pid())`.execute(db)),
    LOST,
  )
  t.not(await app.db.session(pidOf), pid)
  t.match(app.db.snapshot().totals, { invalidated: 1, opened: 2 })
})
