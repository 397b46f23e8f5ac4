import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { garblingSocket } from '../support/garbling-socket.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// A session's way to the server: waiting, boarding, departing, being lost, being cut.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const pidOf = async (db: Session) =>
  (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)).rows[0]?.pid

t.beforeEach(() => database.query('truncate notes restart identity'))

test('boards while it waits for a connection, and leaves in one flight', async (t) => {
  const goOn = gate()
  const { post, app, proxy } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      const first = insert(db, 'a')
      await eventually(() => app.db.snapshot().waiting === 1)
      const second = insert(db, 'b')
      t.strictSame([db.state, db.inTransaction], ['begun', false])
      goOn.open()
      await Promise.all([first, second])
      return 'ok'
    },
    { pool: { size: 1, prePing: false }, settings: () => ({ 'app.tenant': 'acme' }) },
  )
  const holder = app.db.session(async (db) => {
    await db.begin()
    await goOn.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.equal((await post()).statusCode, 200)
  await holder
  t.ok(
    proxy.statements().some((flight) => flight.length === 4),
    'BEGIN, settings and both',
  )
  t.strictSame(await notes(), ['a', 'b'])
})

for (const fate of ['comes', 'never comes'] as const) {
  test(`holds what is issued before the answer to BEGIN, which then ${fate}`, async (t) => {
    const { post, proxy, app } = await oneRouteThroughProxy(t, database, async (db) => {
      const held = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
      const first = insert(db, 'a')
      await held.sprung
      const second = insert(db, 'b')
      await database.query('select 1')
      t.equal(proxy.flights.length, 1)
      if (fate === 'comes') held.release()
      else proxy.cut('reset')
      await Promise.all([first, second])
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.strictSame((await notes()).sort(), ['a', 'b'])
    t.equal(app.db.snapshot().totals.replays, fate === 'comes' ? 0 : 1)
  })
}

test('replays a first flight once where BEGIN was not answered', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    return 'ok'
  })
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a'])
  t.equal(app.db.snapshot().totals.replays, 1)
})

test('replays no more than once', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(t, database, (db) => insert(db, 'a'))
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset', { times: 2 })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
  t.equal(app.db.snapshot().totals.replays, 1)
})

test('never replays a flight with a COMMIT in it', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(t, database, (db) => {
    db.add(db.insertInto('notes').values({ note: 'a' }))
    return 'ok'
  })
  proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'reset')
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  t.equal(app.db.snapshot().totals.replays, 0)
})

test('statements that get no connection are refused, and the next one asks again', async (t) => {
  const goOn = gate()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await t.rejects(insert(db, 'a'), { code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
      await t.rejects(db.begin(), { code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
      goOn.open()
      await eventually(() => app.db.snapshot().checkedOut === 0)
      await insert(db, 'b')
      return 'ok'
    },
    { pool: { size: 1, timeoutMillis: 100 } },
  )
  const holder = app.db.session(async (db) => {
    await db.begin()
    await goOn.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.equal((await post()).statusCode, 200)
  await holder
  t.strictSame(await notes(), ['b'])
})

test('settings that throw are told to everybody who boards', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      for (const { status } of await Promise.allSettled([insert(db, 'a'), insert(db, 'b')])) t.equal(status, 'rejected')
      return 'ok'
    },
    {
      settings: () => {
        throw new Error('no tenant')
      },
    },
  )
  t.equal((await post()).statusCode, 200)
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

test('a session that holds its connection for longer than maxSessionMillis is cut', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      await t.rejects(sql`select pg_sleep(30)`.execute(db))
      await t.rejects(insert(db, 'b'), { code: 'FST_REQUEST_DB_SESSION_ENDED', message: /maxSessionMillis/ })
      return 'went on'
    },
    { maxSessionMillis: 150 },
  )
  t.ok((await post()).statusCode >= 500)
  t.strictSame(await notes(), [])
  await eventually(() => app.db.snapshot().checkedOut === 0)
})

test('what runs when a session is rolled back is cancelled, and its connection reused', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      const sleeping = sql`select pg_sleep(30)`.execute(db)
      sleeping.catch(() => {})
      await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep')))
      await db.rollback()
      await t.rejects(sleeping, { code: '57014' })
      return { pid: await pidOf(db) }
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  t.match(app.db.snapshot().totals, { cancels: 1, opened: 1 })
})

for (const text of ['COMMIT', 'ROLLBACK'] as const) {
  test(`a ${text} without an answer costs the connection, within settleTimeoutMillis`, async (t) => {
    const { post, proxy, app } = await oneRouteThroughProxy(
      t,
      database,
      async (db) => {
        await insert(db, 'a')
        proxy.trap({ from: 'client', type: 'P', text }, 'swallow')
        if (text === 'ROLLBACK') throw new Error('mine')
        return 'ok'
      },
      { settleTimeoutMillis: 150 },
    )
    const expected = text === 'COMMIT' ? { code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' } : { message: 'mine' }
    t.match((await post()).json(), { statusCode: 500, ...expected })
    await eventually(() => app.db.snapshot().open === 0)
  })
}

test('lends the raw client, takes it back, and says what was lost meanwhile', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    t.equal(await db.withClient(async () => 'back'), 'back')
    await t.rejects(
      db.withClient(() => Promise.reject(new Error('mine'))),
      { message: 'mine' },
    )
    await t.rejects(
      db.withClient((client) => client.query('select pg_terminate_backend(pg_backend_pid())')),
      { code: 'FST_REQUEST_DB_CONNECTION_LOST' },
    )
    t.equal(db.state, 'failed')
    await db.rollback()
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['after'])
})

test('without a transaction it has the connection only while a statement runs', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await Promise.all([insert(db, 'a'), insert(db, 'b')])
      t.equal(app.db.snapshot().checkedOut, 0)
      await t.rejects(sql`select pg_terminate_backend(pg_backend_pid())`.execute(db))
      await insert(db, 'c')
      return 'ok'
    },
    { route: { autocommit: true }, settings: () => ({ 'app.tenant': 'acme' }) },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['a', 'b', 'c'])
})

test('a transaction that the app ended itself, with or without a chain, is doomed', async (t) => {
  for (const text of ['commit', 'rollback and chain']) {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'a')
      await sql.raw(text).execute(db)
      await t.rejects(insert(db, 'b'), { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  }
  t.notOk((await notes()).includes('b'))
})

test('a BEGIN that the server refuses dooms what left with it and what was held', async (t) => {
  const { socket, garble } = garblingSocket()
  const connection = { connectionString: database.connectionString, stream: () => socket }
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      const first = insert(db, 'a')
      // The second one comes when the first flight has left.
      const second = new Promise((resolve) => setImmediate(resolve)).then(() => insert(db, 'b'))
      const settled = await Promise.allSettled([first, second])
      t.strictSame(
        settled.map(({ status }) => status),
        ['rejected', 'rejected'],
      )
      return 'went on'
    },
    { pool: { size: 1 }, connection },
  )
  await app.db.ping()
  garble()
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await notes(), [])
})

/** What Kysely 0.29 does for `inflightQueryAbortStrategy: 'cancel query'`. */
const cancelQuery = (db: Session) =>
  db
    .getExecutor()
    .provideConnection((connection) => (connection as unknown as { cancelQuery(): Promise<void> }).cancelQuery())

for (const autocommit of [false, true]) {
  test(`a statement is cancelled on request (${autocommit ? 'autocommit' : 'transaction'})`, async (t) => {
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await cancelQuery(db)
        const sleeping = sql`select pg_sleep(30)`.execute(db)
        sleeping.catch(() => {})
        await eventually(() => app.db.snapshot().checkedOut === 1)
        if (!autocommit) await cancelQuery(db)
        await t.rejects(autocommit ? db.withClient(async () => {}).then(() => sleeping) : sleeping, { code: '57014' })
        throw new Error('mine')
      },
      { route: { autocommit, statementTimeoutMillis: autocommit ? 100 : false } },
    )
    t.match((await post()).json(), { message: 'mine' })
    await eventually(() => app.db.snapshot().checkedOut === 0)
  })
}

test('where it is uncertain whether a cancel has hit, the connection is dropped', async (t) => {
  const { post, app, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    const sleeping = sql`select pg_sleep(1)`.execute(db)
    await proxy.refuse()
    await Promise.allSettled([db.rollback(), sleeping])
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  await eventually(() => app.db.snapshot().open === 0)
  t.strictSame(await notes(), [])
})

test('a pool that closes ends the session when its grace is over', async (t) => {
  const inside = gate()
  const ended = gate<unknown>()
  const { app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      inside.open()
      await sql`select pg_sleep(30)`.execute(db).then(ended.open, ended.open)
    },
    { closeGraceMillis: 50 },
  )
  app.inject({ method: 'POST', url: '/' }).catch(() => {})
  await inside.opened
  await app.close()
  t.ok((await ended.opened) instanceof Error)
  t.strictSame(await notes(), [])
})

test('savepoints, and writes that are left at the end of an autocommit session', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(() => insert(db, 'a'))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  const alone = await oneRoute(
    t,
    database,
    (db) => {
      db.add(db.insertInto('notes').values({ note: 'b' }))
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await alone.post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b'])
})
