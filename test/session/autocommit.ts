import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { type Handler, type OneRouteOptions, oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const autocommit = (t: Test, handler: Handler, options: OneRouteOptions = {}) =>
  oneRouteThroughProxy(t, database, handler, { ...options, route: { autocommit: true, ...options.route } })

t.beforeEach(() => database.query('truncate notes restart identity'))

test('statements go without BEGIN and COMMIT, each its own flight', async (t) => {
  const { post, proxy } = await autocommit(t, async (db) => {
    await insert(db, 'A')
    t.strictSame(await notes(), ['A'])
    return db.selectFrom('notes').selectAll().execute()
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [[/^insert/], [/^select/]])
  t.equal(proxy.roundTrips(), 2)
})

test('what a failing request has written stays', async (t) => {
  const { post } = await autocommit(t, async (db) => {
    await insert(db, 'A')
    throw new Error('mine')
  })
  t.match((await post()).json(), { statusCode: 500, message: 'mine' })
  t.strictSame(await notes(), ['A'])
})

test('a statement that fails harms no other, swallowed or not', async (t) => {
  const { post } = await autocommit(t, async (db) => {
    const settled = await Promise.allSettled([insert(db, 'A'), sql`select 1 / 0`.execute(db), insert(db, 'B')])
    t.strictSame(
      settled.map(({ status }) => status),
      ['fulfilled', 'rejected', 'fulfilled'],
    )
    await insert(db, 'C')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['A', 'B', 'C'])
})

test('the connection is given back between statements', async (t) => {
  const { post } = await autocommit(
    t,
    async (db, { server }) => {
      await insert(db, 'A')
      t.match(server.db.snapshot(), { checkedOut: 0 })
      await server.db.session((own) => insert(own, 'B'))
      await insert(db, 'C')
      return 'ok'
    },
    { pool: { size: 1, timeoutMillis: 500 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B', 'C'])
})

test('state and inTransaction', async (t) => {
  const { post } = await autocommit(t, async (db) => {
    t.strictSame([db.state, db.inTransaction], ['idle', false])
    await insert(db, 'A')
    t.strictSame([db.state, db.inTransaction], ['idle', false])
    await sql`select 1 / 0`.execute(db).catch(() => {})
    t.strictSame([db.state, db.inTransaction], ['idle', false])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('begin() is refused, commit() and rollback() do nothing', async (t) => {
  const { post, proxy } = await autocommit(t, async (db) => {
    await t.rejects(db.begin(), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
    await insert(db, 'A')
    await db.rollback()
    await insert(db, 'B')
    await db.commit()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
  t.equal(proxy.flights.length, 2)
})

test('transaction().execute(fn) is a real transaction', async (t) => {
  const { post, proxy } = await autocommit(t, async (db) => {
    await db.transaction().execute(async (trx) => {
      await insert(trx, 'A')
      await insert(db, 'B, through the outer handle')
    })
    await t.rejects(
      db.transaction().execute(async (trx) => {
        await insert(trx, 'C')
        await insert(db, 'D')
        throw new Error('inner')
      }),
      { message: 'inner' },
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B, through the outer handle'])
  t.match(proxy.statements(), [
    ['BEGIN', /^insert/],
    [/^insert/],
    ['COMMIT'],
    ['BEGIN', /^insert/],
    [/^insert/],
    ['ROLLBACK'],
  ])
})

test('a transaction in a transaction is a savepoint', async (t) => {
  const { post, proxy } = await autocommit(t, async (db) => {
    await db.transaction().execute(async () => {
      await insert(db, 'A')
      await t.rejects(
        db.transaction().execute(async () => {
          await insert(db, 'B')
          throw new Error('inner')
        }),
      )
      await db.transaction().execute(() => insert(db, 'C'))
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'C'])
  t.equal(
    proxy
      .statements()
      .flat()
      .filter((text) => text === 'BEGIN').length,
    1,
  )
})

test('a transaction may have an isolation level and an access mode of its own', async (t) => {
  const { post, proxy } = await autocommit(t, async (db) => {
    await db
      .transaction()
      .setIsolationLevel('serializable')
      .execute((trx) => insert(trx, 'A'))
    await t.rejects(
      db
        .transaction()
        .setAccessMode('read only')
        .execute((trx) => insert(trx, 'B')),
      { code: '25006' },
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
  t.equal(proxy.statements()[0]?.[0], 'BEGIN ISOLATION LEVEL SERIALIZABLE')
})

test('transactions side by side have a connection each, and their rows and statements keep apart', async (t) => {
  const { post, app } = await autocommit(
    t,
    async (db) => {
      const bothIn = gate()
      let inside = 0
      const one = (n: number) =>
        db.transaction().execute(async () => {
          await insert(db, `${n}`)
          if (++inside === 2) bothIn.open()
          await bothIn.opened
          if (n === 2) throw new Error('inner')
        })
      const settled = await Promise.allSettled([one(1), one(2), insert(db, 'beside')])
      return settled.map(({ status }) => status)
    },
    { pool: { size: 3 } },
  )
  t.strictSame((await post()).json(), ['fulfilled', 'rejected', 'fulfilled'])
  t.strictSame((await notes()).sort(), ['1', 'beside'])
  t.equal(app.db.snapshot().checkedOut, 0)
})

test('a COMMIT that fails in a transaction of an autocommit session rejects that transaction', async (t) => {
  await database.query('create table once (n int unique deferrable initially deferred)')
  const { post } = await autocommit(t, async (db) => {
    const error = await db
      .transaction()
      .execute(async () => {
        await sql`insert into once values (1), (1)`.execute(db)
      })
      .catch((error: unknown) => error)
    t.match(error, { code: '23505' })
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['after'])
  t.strictSame(await database.rows('once'), [])
})

test('a transaction nobody awaited is rolled back, and the answer says so', async (t) => {
  const goOn = gate()
  const ended = gate<unknown>()
  const { post } = await autocommit(t, async (db) => {
    const inside = gate()
    db.transaction()
      .execute(async (trx) => {
        await insert(trx, 'A')
        inside.open()
        await goOn.opened
        await insert(trx, 'B')
      })
      .then(ended.open, ended.open)
    await inside.opened
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  goOn.open()
  t.ok((await ended.opened) instanceof Error)
  t.strictSame(await notes(), [])
})

test('a statement nobody awaits has run when the answer leaves', async (t) => {
  const { post } = await autocommit(t, (db) => {
    void insert(db, 'A')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('settings and a statement timeout hold for each statement, and for it alone', async (t) => {
  const { post, app } = await autocommit(
    t,
    async (db) => {
      const shown = () =>
        sql`select current_setting('app.tenant') as tenant, current_setting('statement_timeout') as timeout`.execute(db)
      const [first, second] = [await shown(), await shown()]
      t.strictSame(first.rows, [{ tenant: 'acme', timeout: '700ms' }])
      t.strictSame(second.rows, first.rows)
      return 'ok'
    },
    { pool: { size: 1 }, settings: () => ({ 'app.tenant': 'acme' }), route: { statementTimeoutMillis: 700 } },
  )
  t.equal((await post()).statusCode, 200)
  const { rows } =
    await sql`select current_setting('app.tenant', true) as tenant, current_setting('statement_timeout') as timeout`.execute(
      app.db.kysely,
    )
  t.strictSame(rows, [{ tenant: '', timeout: '0' }])
})

test('an autocommit session that is read only reads, and its writes are refused', async (t) => {
  const { post } = await autocommit(
    t,
    async (db) => {
      await t.rejects(insert(db, 'A'), { code: '25006' })
      await t.rejects(
        db.transaction().execute((trx) => insert(trx, 'B')),
        { code: '25006' },
      )
      return db.selectFrom('notes').selectAll().execute()
    },
    { route: { readOnly: true } },
  )
  t.strictSame((await post()).json(), [])
  t.strictSame(await notes(), [])
})

test('withClient has the connection to itself, without a transaction, and gives it back', async (t) => {
  const { post, app } = await autocommit(
    t,
    async (db) => {
      await db.withClient(async (client) => {
        await client.query("insert into notes (note) values ('A')")
        t.strictSame(await notes(), ['A'])
        // Statements that PostgreSQL does not run in a transaction are what this is for.
        await client.query('vacuum notes')
      })
      t.equal(app.db.snapshot().checkedOut, 0)
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
})

test('what PostgreSQL does not run in a transaction runs in an autocommit session', async (t) => {
  const { post } = await autocommit(t, async (db) => {
    await sql`vacuum notes`.execute(db)
    await sql`create index concurrently on notes (note)`.execute(db)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('a backend killed between two statements costs nobody anything', async (t) => {
  const { post } = await autocommit(
    t,
    async (db) => {
      const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
      await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
      await insert(db, 'A')
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('a backend killed during a statement: CONNECTION_LOST, and the next statement has a new connection', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const kill = sql`select pg_terminate_backend(pg_backend_pid())`.execute(db)
      await t.rejects(kill, { code: 'FST_REQUEST_DB_CONNECTION_LOST', statusCode: 503 })
      await insert(db, 'A')
      return 'ok'
    },
    { route: { autocommit: true }, pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('it is never replayed: a statement without a transaction may have been carried out', async (t) => {
  const { post, proxy } = await autocommit(t, (db) => insert(db, 'A'))
  proxy.trap({ from: 'server', type: 'C', text: 'INSERT' }, 'reset')
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  t.strictSame(await notes(), ['A'])
})

test('sessions outside of a request can be autocommit too', async (t) => {
  const { app } = await autocommit(t, () => 'unused')
  await t.rejects(
    app.db.session({ autocommit: true }, async (db) => {
      await insert(db, 'A')
      throw new Error('mine')
    }),
  )
  t.strictSame(await notes(), ['A'])
})
