import { sql } from 'kysely'
import type { Client } from 'pg'
import { buildApp } from '../../support/app.ts'
import { type Borrower, borrow, borrowMany } from '../../support/borrower.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { openHttp } from '../../support/http-client.ts'
import { holds, inBothModes } from '../../support/modes.ts'
import { add, isGone, notesIn, pidOf } from '../../support/notebook.ts'
import { watchedApps } from '../../support/nothing-left.ts'
import { watchPeak } from '../../support/peak.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { t, test } from '../../support/test.ts'

/*
 * The scenarios of pgx: pgxpool/pool_test.go, tx_test.go and conn_test.go, pgx's tx_test.go, the cancelling in
 * pgconn_test.go, and puddle's pool_test.go underneath. Those that do not apply:
 * - parsing and copying a configuration, tracers, hooks on connect, acquire and release, hijacking: there is nothing like it;
 * - minimum numbers of connections, idle times, health checks in the background, Reset(): connections are opened when wanted;
 * - batches, CopyFrom, rows that are not closed: pg's and Kysely's own affairs.
 */

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

/** What somebody leaves behind on the raw client of a session without transactions. */
const LEFT: Record<string, { leave: (client: Client) => unknown; isKept: boolean }> = {
  'in a transaction': {
    leave: (client) => client.query("begin; insert into notes (note) values ('lost')"),
    isKept: false,
  },
  'in a failed transaction': {
    leave: (client) => client.query('begin; select 1/0').catch(() => {}),
    isKept: false,
  },
  'busy with a statement': {
    leave: (client) => void client.query('select pg_sleep(0.2)').catch(() => {}),
    isKept: true,
  },
  'busy, and then in a transaction': {
    leave: (client) =>
      void client.query("begin; insert into notes (note) values ('lost'); select pg_sleep(0.2)").catch(() => {}),
    isKept: false,
  },
  closed: { leave: (client) => client.end(), isKept: false },
}

for (const [how, { leave, isKept }] of Object.entries(LEFT)) {
  for (const waits of [false, true]) {
    const who = waits ? 'who waits for it' : 'the next'
    test(`a connection that is given back ${how} is ${isKept ? 'used again' : 'closed'}, and ${who} finds nothing of it`, async (t) => {
      const app = await buildApp(t, database, { pool: { size: 1 } })
      await app.db.ping()
      const pid = await app.db.session(pidOf)
      let waiter: Borrower | undefined
      const leaver = app.db.session({ autocommit: true }, (db) =>
        db.withClient(async (client) => {
          if (waits) {
            waiter = borrow(app)
            await eventually(() => app.db.snapshot().waiting === 1)
          }
          await leave(client)
        }),
      )
      await leaver.catch((error) => t.match(error, { code: 'FST_REQUEST_DB_CONNECTION_LOST' }))
      const next = waiter ?? borrow(app)
      t.equal((await next.got) === pid, isKept)
      await add(next.db(), 'kept')
      await next.end()
      await holds(t, database, ['kept'])
      if (!isKept) await eventually(() => isGone(database, pid))
      t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { opened: isKept ? 1 : 2, invalidated: isKept ? 0 : 1 } })
    })
  }
}

for (const first of ['opened', 'waited for'] as const) {
  test(`a session without transactions gets the raw client of a connection that has to be ${first}`, async (t) => {
    const app = await buildApp(t, database, { pool: { size: 1, timeoutMillis: 2000 }, maxSessionMillis: 3000 })
    const held = first === 'opened' ? undefined : borrow(app)
    await held?.got
    const asked = app.db.session({ autocommit: true }, (db) =>
      db.withClient((client) => client.query("insert into notes (note) values ('kept')")),
    )
    await held?.end()
    await asked
    await holds(t, database, ['kept'])
  })
}

test('three connections that were killed while they were idle are replaced without an error', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 3 } })
  const pids = await Promise.all((await borrowMany(app, 3)).map((one) => one.got.finally(() => one.end())))
  await eventually(() => app.db.snapshot().idle === 3)
  await Promise.all(pids.map((pid) => database.query('select pg_terminate_backend($1, 5000)', [pid])))
  const again = await borrowMany(app, 3)
  for (const { got } of again) t.notOk(pids.includes(await got))
  await Promise.all(again.map((one) => one.end()))
  t.match(app.db.snapshot().totals, { opened: 6, invalidated: 3, failedPings: 0 })
})

for (const { late, failedPings } of [
  { late: 30, failedPings: 0 },
  { late: 300, failedPings: 1 },
]) {
  test(`where the server is ${late} ms away a ping that may take 150 ms fails ${failedPings} times, and the session is served`, async (t) => {
    const clock = takeClock(t)
    const proxy = await startProxy(t, database.connectionString)
    const pool = { size: 2, prePing: { idleMillis: 1000, timeoutMillis: 150 } }
    const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool })
    await Promise.all((await borrowMany(app, 2)).map((one) => one.end()))
    await eventually(() => app.db.snapshot().idle === 2)
    clock.advance(5000)
    proxy.delay({ toClient: late })
    await app.db.session((db) => add(db, 'kept'))
    t.match(app.db.snapshot().totals, { failedPings, invalidated: 2 * failedPings, opened: 2 + failedPings })
    await holds(t, database, ['kept'])
  })
}

test('connections whose life ends all the time under load are never cut in use, and never more than their number', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 4, recycleMillis: 40, prePing: false } })
  const peak = await watchPeak(t, database, watchedApps().at(-1)!.application)
  let written = 0
  const work = async (worker: number) => {
    for (let i = 0; i < 20; i++) {
      await app.db.session(async (db) => {
        const pid = await pidOf(db)
        if (i % 4 === 0) await sql`select pg_sleep(0.02)`.execute(db)
        await add(db, `${worker}.${i}`)
        t.equal(await pidOf(db), pid)
      })
      written++
    }
  }
  await Promise.all(Array.from({ length: 12 }, (_, worker) => work(worker)))
  t.ok((await peak.stop()) <= 4)
  t.equal((await notesIn(database)).length, written)
  await eventually(() => app.db.snapshot().open === app.db.snapshot().idle)
  const { open, totals } = app.db.snapshot()
  t.ok(totals.recycled > 4, `${totals.recycled} were replaced`)
  t.equal(totals.opened, open + totals.recycled)
  t.match(totals, { invalidated: 0, closed: 0, timeouts: 0, commits: 240 })
})

test('an expired connection is not used by any of many who come at a time, waiting or not', async (t) => {
  const clock = takeClock(t)
  const app = await buildApp(t, database, { pool: { size: 3, recycleMillis: 60_000, prePing: false } })
  const old = await Promise.all((await borrowMany(app, 3)).map((one) => one.got.finally(() => one.end())))
  await eventually(() => app.db.snapshot().idle === 3)
  clock.advance(70_000)
  const pids = await Promise.all(Array.from({ length: 30 }, () => app.db.session(pidOf)))
  t.notOk(pids.some((pid) => old.includes(pid)))
  t.match(app.db.snapshot().totals, { recycled: 3, opened: 6 })
})

inBothModes(
  database,
  'whose client leaves while a connection is opened for it leaves that to who waits behind',
  async (t, commitOn) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
    const app = await buildApp(t, database, options, (app) => {
      app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
        await add(db, params.note)
        return 'kept'
      })
    })
    const startup = proxy.trap({ from: 'client', type: 'startup' }, 'hold')
    const first = (await openHttp(t, app)).send('POST', '/lost')
    await startup.sprung
    const second = (await openHttp(t, app)).send('POST', '/kept')
    const third = (await openHttp(t, app)).send('POST', '/lost')
    await eventually(() => app.db.snapshot().waiting === 2)
    first.destroy()
    third.destroy()
    await eventually(() => app.db.snapshot().waiters.length === 1)
    startup.release()
    t.equal((await second.response()).status, 200)
    await holds(t, database, ['kept'])
    t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { opened: 1, checkouts: 1, cancels: 0 } })
    t.equal(proxy.sessions.length, 1)
  },
)

test('five hundred cancels that race the end of their statements never hit the next session', async (t) => {
  const SIZE = 20
  const app = await buildApp(t, database, { pool: { size: SIZE } })
  let cancelled = 0
  let hurt = 0
  const attacker = async (round: number) => {
    const mine = new Error('mine')
    const outcome = await app.db
      .session(async (db) => {
        await add(db, 'lost')
        // Cancelled 50 ms after the session has failed, which is when the statement ends.
        const slow = sql`select pg_sleep(${0.046 + (round % 10) * 0.001}::float8)`.execute(db)
        slow.catch(() => cancelled++)
        throw mine
      })
      .catch((error) => error)
    if (outcome !== mine) t.fail(`the session's own error is told: ${outcome}`)
  }
  const victim = (round: number) =>
    app.db
      .session(async (db) => {
        await sql`select pg_sleep(0.002)`.execute(db)
        await add(db, `kept ${round}`)
        await sql`select pg_sleep(0.002)`.execute(db)
      })
      .catch((error) => {
        hurt++
        t.fail(`round ${round}: ${error}`)
      })
  const rounds = Array.from({ length: 500 }, (_, round) => [attacker(round), victim(round)]).flat()
  await Promise.all(rounds)
  const { totals } = app.db.snapshot()
  t.equal(hurt, 0)
  t.equal((await notesIn(database)).length, 500)
  t.ok(totals.cancels > 0 && cancelled > 0, `${totals.cancels} cancels, of which ${cancelled} hit`)
  t.match(totals, { commits: 500, rollbacks: 500, failedCommits: 0, invalidated: 0 })
  t.equal(totals.opened, SIZE)
})

test('a statement that ends by itself is not taken for one that was cancelled', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 1 } })
  let outcome: unknown
  await app.db
    .session(async (db) => {
      await add(db, 'lost')
      outcome = sql`select 1 as one`.execute(db).then(({ rows }) => rows)
      throw new Error('mine')
    })
    .catch(() => {})
  t.strictSame(await outcome, [{ one: 1 }])
  t.equal(app.db.snapshot().totals.cancels, 0)
})
