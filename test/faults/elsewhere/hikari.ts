import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../../support/app.ts'
import { borrow, borrowMany } from '../../support/borrower.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { holds, inBothModes } from '../../support/modes.ts'
import { add, notesIn, pidOf } from '../../support/notebook.ts'
import { watchedApps } from '../../support/nothing-left.ts'
import { watchPeak } from '../../support/peak.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { t, test } from '../../support/test.ts'

/*
 * The scenarios of HikariCP's src/test/java/com/zaxxer/hikari/pool. Those that do not apply:
 * - TestConnectionTimeoutRetry: an attempt that fails is told at once, with `retryable`, instead of being repeated in silence;
 * - minimum idle, keepalive, the house keeper, suspension, eviction by hand, credentials changed while running, JMX, JNDI, Hibernate;
 * - auto-commit, catalog, schema, network timeout, statement caches, proxies of JDBC objects;
 * - TestConcurrentBag, TestFastList: another way to pass connections on.
 */

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))
const POOL_CODES = ['FST_REQUEST_DB_POOL_TIMEOUT', 'FST_REQUEST_DB_POOL_SATURATED']

/** `POST /:note` writes it, and keeps its connection for `millis` at least. */
const slowly = (millis: number) => (app: FastifyInstance) => {
  app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
    await add(db, params.note)
    await sql`select pg_sleep(${millis / 1000}::float8)`.execute(db)
    return 'kept'
  })
}

inBothModes(
  database,
  'a saturated pool with slow connects recovers as soon as fewer come than it can serve',
  async (t, commitOn) => {
    const proxy = await startProxy(t, database.connectionString)
    const connection = { connectionString: proxy.connectionString, connectionTimeoutMillis: 10_000 }
    const pool = { size: 10, timeoutMillis: 250, maxWaiting: 100 }
    const app = await buildApp(t, database, { connection, commitOn, pool }, slowly(100))
    proxy.delay({ toServer: 10 })
    const post = (note: string) => app.inject({ method: 'POST', url: `/${note}` })
    const flood = await Promise.all(Array.from({ length: 80 }, (_, at) => post(`flood ${at}`)))
    const told = flood.map(({ statusCode }) => statusCode)
    t.ok(told.includes(200) && told.includes(503), 'some are served, and some are not')
    for (const answer of flood) if (answer.statusCode !== 200) t.ok(POOL_CODES.includes(answer.json().code))
    const workers = Array.from({ length: 10 }, async (_, worker) => {
      for (let i = 0; i < 5; i++) t.equal((await post(`calm ${worker} ${i}`)).statusCode, 200)
    })
    await Promise.all(workers)
    const kept = flood.flatMap(({ statusCode }, at) => (statusCode === 200 ? [`flood ${at}`] : []))
    await eventually(() => app.db.snapshot().checkedOut === 0)
    const notes = await notesIn(database)
    t.strictSame(notes.filter((note) => note.startsWith('flood')).sort(), kept.sort())
    t.equal(notes.length, kept.length + 50)
    const { totals, open } = app.db.snapshot()
    t.match(totals, { timeouts: 80 - kept.length, commits: notes.length, failedConnects: 0, invalidated: 0 })
    t.ok(open <= 10 && totals.opened === open)
  },
)

test('a dead connection that the network does not let close delays nobody', async (t) => {
  const clock = takeClock(t)
  const proxy = await startProxy(t, database.connectionString)
  const pool = { size: 2, prePing: { idleMillis: 1000, timeoutMillis: 100 }, timeoutMillis: 5000 }
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool })
  await Promise.all((await borrowMany(app, 2)).map((one) => one.end()))
  await eventually(() => app.db.snapshot().idle === 2)
  clock.advance(5000)
  proxy.swallow({ passesClose: false })
  const since = performance.now()
  const both = await borrowMany(app, 2)
  t.ok(performance.now() - since < 450, `served after ${Math.round(performance.now() - since)} ms`)
  await Promise.all(both.map((one) => one.end()))
  t.match(app.db.snapshot(), { open: 2, idle: 2, totals: { failedPings: 2, invalidated: 2, opened: 4 } })
})

test('an expired connection whose goodbye is never answered delays only who has its place', async (t) => {
  const clock = takeClock(t)
  const proxy = await startProxy(t, database.connectionString)
  const pool = { size: 2, recycleMillis: 60_000, prePing: false as const }
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool })
  await app.db.ping()
  clock.advance(70_000)
  proxy.swallow({ passesClose: false })
  const since = performance.now()
  const took = async () => {
    await app.db.session(pidOf)
    return performance.now() - since
  }
  const [behind, beside] = (await Promise.all([took(), took()])) as [number, number]
  t.ok(beside < behind, `${Math.round(beside)} ms beside it, ${Math.round(behind)} ms behind it`)
  t.ok(behind < 2000)
  t.match(app.db.snapshot(), { open: 1, totals: { recycled: 1, opened: 2, timeouts: 0 } })
})

for (const connects of ['quickly', 'slowly', 'never'] as const) {
  inBothModes(
    database,
    `close() among sixty who ask at a time, where connections open ${connects}: everybody is told, and what was acknowledged is kept`,
    async (t, commitOn) => {
      const proxy = await startProxy(t, database.connectionString)
      const { connectionString } = proxy
      if (connects === 'slowly') proxy.delay({ toServer: 15 })
      if (connects === 'never') proxy.silenceStartup()
      const options = { connectionString, commitOn, closeGraceMillis: 1500, pool: { size: 4, maxOverflow: 2 } }
      const app = await buildApp(t, database, options, slowly(5))
      const told: Promise<[number, string]>[] = []
      for (let at = 0; at < 60; at++) {
        const note = `note ${at}`
        told.push(app.inject({ method: 'POST', url: `/${note}` }).then(({ statusCode }) => [statusCode, note]))
        if (at % 5 === 0) await new Promise((resolve) => setImmediate(resolve))
      }
      if (connects !== 'never') await eventually(() => app.db.snapshot().totals.checkouts > 2)
      else await eventually(() => proxy.sessions.length === 6)
      const since = performance.now()
      await app.close()
      t.ok(performance.now() - since < 4000)
      const answers = await Promise.all(told)
      const kept = answers.filter(([status]) => status === 200).map(([, note]) => note)
      t.ok(answers.every(([status]) => status === 200 || status === 503))
      if (connects === 'never') t.strictSame(kept, [])
      t.match(app.db.snapshot(), { open: 0, idle: 0, checkedOut: 0, waiting: 0 })
      await eventually(async () => (await database.backends(watchedApps().at(-1)!.application)).length === 0)
      t.strictSame((await notesIn(database)).sort(), kept.sort())
    },
  )
}

test('sessions outside of requests that race close() are served or refused, and none hangs', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 3 }, closeGraceMillis: 1500 })
  const kept: string[] = []
  const codes = new Set<string>()
  const work = async (worker: number) => {
    let isServed = true
    for (let i = 0; isServed; i++) {
      const note = `${worker}.${i}`
      await app.db
        .session((db) => add(db, note))
        .then(
          () => kept.push(note),
          ({ code }) => {
            isServed = false
            codes.add(code)
          },
        )
    }
  }
  const workers = Array.from({ length: 30 }, (_, worker) => work(worker))
  await eventually(() => kept.length > 100)
  await app.close()
  await t.rejects(app.db.session(pidOf), { code: 'FST_REQUEST_DB_POOL_CLOSED' })
  await Promise.all(workers)
  t.strictSame([...codes], ['FST_REQUEST_DB_POOL_CLOSED'])
  t.strictSame((await notesIn(database)).sort(), kept.sort())
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
})

test('fifty who take a connection forty times each never share one', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 5, maxOverflow: 2 } })
  const peak = await watchPeak(t, database, watchedApps().at(-1)!.application)
  const users = new Map<number, number>()
  let shared = 0
  const work = async (worker: number) => {
    for (let i = 0; i < 40; i++) {
      await app.db.session(async (db) => {
        const pid = await pidOf(db)
        if (users.has(pid)) shared++
        users.set(pid, worker)
        await sql`select 1`.execute(db)
        if (users.get(pid) !== worker) shared++
        users.delete(pid)
      })
    }
  }
  await Promise.all(Array.from({ length: 50 }, (_, worker) => work(worker)))
  t.equal(shared, 0)
  t.ok((await peak.stop()) <= 7)
  t.match(app.db.snapshot().totals, { commits: 2000, rollbacks: 0, timeouts: 0, invalidated: 0 })
})

test('backends that die under load are replaced by no more than as many', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 4 } })
  const application = watchedApps().at(-1)!.application
  const peak = await watchPeak(t, database, application)
  let isOver = false
  const kept: string[] = []
  const codes = new Set<string>()
  const work = async (worker: number) => {
    for (let i = 0; !isOver; i++) {
      const note = `${worker}.${i}`
      await app.db
        .session((db) => add(db, note))
        .then(
          () => kept.push(note),
          ({ code }) => codes.add(code),
        )
    }
  }
  const workers = Array.from({ length: 12 }, (_, worker) => work(worker))
  for (let round = 0; round < 25; round++) {
    const served = kept.length
    await eventually(() => kept.length > served + 20)
    const [victim] = (await database.backends(application)).map(({ pid }) => pid)
    if (victim) await database.query('select pg_terminate_backend($1)', [victim])
  }
  isOver = true
  await Promise.all(workers)
  // Lost before COMMIT was sent, or after: both are honest. Nothing else is told.
  t.strictSame(
    [...codes].filter((code) => !/CONNECTION_LOST|COMMIT_UNKNOWN/.test(code)),
    [],
  )
  const notes = new Set(await notesIn(database))
  t.strictSame(
    kept.filter((note) => !notes.has(note)),
    [],
  )
  t.ok((await peak.stop()) <= 4)
  const { open, totals } = app.db.snapshot()
  t.equal(open, totals.opened - totals.invalidated)
  t.ok(totals.invalidated >= 20)
})

test('a connection is lent in the order of asking, also where many borrow for a moment and some for long', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 } })
  const long = await borrowMany(app, 1)
  const order: number[] = []
  const asked = Array.from({ length: 40 }, (_, at) => {
    const one = borrow(app)
    return one.got.then(async () => {
      order.push(at)
      await one.end()
    })
  })
  await Promise.all(asked)
  t.strictSame(
    order,
    order.toSorted((a, b) => a - b),
  )
  await long[0]!.end()
  await holds(t, database, [])
})
