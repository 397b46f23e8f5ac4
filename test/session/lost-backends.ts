import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// The connection dies under a session: what its handler sees, and what the next request finds.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const pidOf = async (db: Session) =>
  (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)).rows[0]?.pid as number
const kill = (pid: number) => database.query('select pg_terminate_backend($1, 2000)', [pid])
const LOST = { code: 'FST_REQUEST_DB_CONNECTION_LOST', statusCode: 503, retryable: true }

t.beforeEach(() => database.query('truncate notes restart identity'))

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`a backend killed between two statements: 503, nothing kept, a new connection (${commitOn})`, async (t) => {
    let killed = 0
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'a')
        const pid = await pidOf(db)
        if (killed === 0) {
          killed = pid
          await kill(pid)
        }
        await insert(db, 'b')
        return { pid }
      },
      { commitOn, pool: { size: 1 } },
    )
    t.match((await post()).json(), { statusCode: 503, code: LOST.code })
    t.strictSame(await database.rows('notes'), [])
    const second = await post()
    t.equal(second.statusCode, 200)
    t.not(second.json().pid, killed)
    await eventually(async () => (await database.rows('notes')).length === 2)
    t.match(app.db.snapshot().totals, { opened: 2, invalidated: 1 })
  })

  test(`a backend killed during a statement: at once, with pg's error as the cause, and no ROLLBACK for the dead (${commitOn})`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(
      t,
      database,
      async (db) => {
        await insert(db, 'a')
        const pid = await pidOf(db)
        const since = performance.now()
        const [sleeping] = await Promise.allSettled([sql`select pg_sleep(5)`.execute(db), kill(pid)])
        t.ok(performance.now() - since < 2000)
        t.match(sleeping, { status: 'rejected', reason: { ...LOST, cause: { code: '57P01' } } })
        t.equal(db.state, 'failed')
        t.equal(db.inTransaction, false)
        if (sleeping.status === 'rejected') throw sleeping.reason
      },
      { commitOn },
    )
    t.match((await post()).json(), { statusCode: 503, code: LOST.code })
    t.notOk(proxy.statements().flat().includes('ROLLBACK'))
    t.strictSame(await database.rows('notes'), [])
  })
}

test('a handler that catches the loss and goes on: no silent new transaction, 503 instead of 200', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await kill(await pidOf(db))
    await t.rejects(insert(db, 'b'), LOST)
    await t.rejects(insert(db, 'c'), LOST)
    await t.rejects(
      db.flush().then(() => db.selectFrom('notes').selectAll().execute()),
      LOST,
    )
    await t.rejects(
      db.withClient(async () => {}),
      LOST,
    )
    await t.rejects(db.begin())
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: LOST.code })
  t.strictSame(await database.rows('notes'), [])
  t.match(app.db.snapshot().totals, { checkouts: 1 })
})

test('after the loss rollback() by hand makes the session usable again', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await kill(await pidOf(db))
    await t.rejects(insert(db, 'b'), LOST)
    await db.rollback()
    t.equal(db.state, 'idle')
    await insert(db, 'c')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'c' }])
})

test('after the loss commit() by hand rejects with it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await db.commit()
    await insert(db, 'b')
    await kill(await pidOf(db))
    await t.rejects(db.commit(), LOST)
    t.equal(db.state, 'idle')
    return 'told by commit()'
  })
  await post()
  t.match(await database.rows('notes'), [{ note: 'a' }], 'what was committed before stays')
})

test('statements under way when the backend dies all learn of it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const pid = await pidOf(db)
    const settled = await Promise.allSettled([
      sql`select pg_sleep(5)`.execute(db),
      insert(db, 'b'),
      insert(db, 'c'),
      db.transaction().execute(() => insert(db, 'd')),
      kill(pid),
    ])
    for (const one of settled.slice(0, 4)) t.match(one, { status: 'rejected', reason: LOST })
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: LOST.code })
})

test('idle backends that are killed cost nobody anything', async (t) => {
  const { app, post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    return 'ok'
  })
  await Promise.all([1, 2, 3].map(() => post()))
  const { idle } = app.db.snapshot()
  t.ok(idle > 0)
  await database.query(
    "select pg_terminate_backend(pid, 2000) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and application_name like 'app %'",
  )
  await eventually(() => app.db.snapshot().idle === 0)
  t.equal((await post()).statusCode, 200)
  t.match(app.db.snapshot().totals, { invalidated: idle })
})

for (const parameter of ['idle_in_transaction_session_timeout', 'transaction_timeout']) {
  test(`${parameter} while no statement runs: 503 instead of a 200 with nothing kept`, async (t) => {
    const { post, app } = await oneRoute(t, database, async (db) => {
      await insert(db, 'a')
      await sql.raw(`set local ${parameter} = 50`).execute(db)
      await eventually(() => app.db.snapshot().open === 0)
      t.equal(db.state, 'failed')
      return 'ok'
    })
    const answer = await post()
    t.match(answer.json(), { statusCode: 503, code: LOST.code })
    t.strictSame(await database.rows('notes'), [])
    t.equal(app.db.snapshot().totals.invalidated, 1)
  })
}

test('transaction_timeout during a statement', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await sql`set local transaction_timeout = 100`.execute(db)
    await t.rejects(sql`select pg_sleep(5)`.execute(db), { ...LOST, cause: { code: '25P04' } })
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: LOST.code })
  t.strictSame(await database.rows('notes'), [])
})

test('the socket is reset instead: the same', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    proxy.cut('reset')
    await t.rejects(insert(db, 'b'), LOST)
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: LOST.code })
  t.strictSame(await database.rows('notes'), [])
})

test('lost before COMMIT arrived, in a flight of its own: COMMIT_UNKNOWN, since nobody can tell', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN', message: /may or may not/ })
  t.strictSame(await database.rows('notes'), [])
})

test('killed by the server while COMMIT waits behind a statement: surely not committed', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const pid = await pidOf(db)
    sql`select pg_sleep(5)`.execute(db).catch(() => {})
    await eventually(async () => (await database.backends()).some(({ state }) => state === 'active'))
    setImmediate(() => void kill(pid))
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 503, code: LOST.code })
  t.strictSame(await database.rows('notes'), [])
})

test('the texts of the errors name no host, user or database; the cause does', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await kill(await pidOf(db))
    await insert(db, 'b')
  })
  const { body } = await post()
  t.notMatch(body, new RegExp(`${database.name}|127\\.0\\.0\\.1|postgres:|insert`))
})
