import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('a nested transaction is a savepoint: it ends with what its request ends with', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const done = await db.transaction().execute(async (trx) => {
      await insert(trx, 'inner')
      return 'the result of the callback'
    })
    t.equal(done, 'the result of the callback')
    throw new Error('mine')
  })
  t.match((await post()).json(), { statusCode: 500, message: 'mine' })
  t.strictSame(await notes(), [])
  await eventually(() => proxy.flights.at(-1)?.statements[0] === 'ROLLBACK')
  t.match(proxy.statements(), [['BEGIN', /^SAVEPOINT/], [/^insert/], [/^RELEASE SAVEPOINT/], ['ROLLBACK']])
})

test('a nested transaction that succeeds is kept with its request', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'before')
    await db.transaction().execute((trx) => insert(trx, 'inner'))
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['before', 'inner', 'after'])
})

for (const [what, fail] of [
  [
    'throws',
    async () => {
      throw new RangeError('inner')
    },
  ],
  [
    'throws null',
    async () => {
      throw null
    },
  ],
  ['fails in SQL', (db: Session) => sql`select 1 / 0`.execute(db)],
  [
    'fails in SQL, swallows it and goes on',
    (db: Session) => sql`select 1 / 0`.execute(db).catch(() => insert(db, 'B2').catch(() => {})),
  ],
] as const) {
  test(`a nested transaction that ${what} leaves nothing, and the request goes on`, async (t) => {
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'A')
        const nested = db.transaction().execute(async (trx) => {
          await insert(trx, 'B')
          await fail(db)
          return 'not reached, or not true'
        })
        await t.rejects(nested)
        t.equal(db.state, 'begun')
        await insert(db, 'C')
        return 'ok'
      },
      { pool: { size: 1 } },
    )
    t.equal((await post()).statusCode, 200)
    t.strictSame(await notes(), ['A', 'C'])
    t.equal((await post()).statusCode, 200)
    t.match(app.db.snapshot(), { open: 1, totals: { opened: 1 } }, 'the connection is reused')
  })
}

test('the error of a nested transaction reaches the caller as it was thrown', async (t) => {
  const mine = new RangeError('mine')
  const { post } = await oneRoute(t, database, async (db) => {
    await t.rejects(
      db.transaction().execute(async () => {
        throw mine
      }),
      mine,
    )
    const error = await db
      .transaction()
      .execute((trx) => sql`select 1 / 0`.execute(trx))
      .catch((error: unknown) => error)
    t.match(error, { code: '22012', severity: 'ERROR' })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('an error in a nested transaction that nobody catches fails the request', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await db.transaction().execute((trx) => sql`select 1 / 0`.execute(trx))
    return 'not reached'
  })
  t.match((await post()).json(), { statusCode: 500, code: '22012' })
  t.strictSame(await notes(), [])
})

test('inside the callback the outer handle belongs to the savepoint too', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await t.rejects(
      db.transaction().execute(async () => {
        await insert(db, 'B through the outer handle')
        await insert(db.withSchema('public'), 'C through a derived one')
        throw new Error('inner')
      }),
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('helpers that nest through request.db, three deep', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const third = () =>
      db.transaction().execute(async () => {
        await insert(db, 'third')
        throw new Error('third')
      })
    const second = () =>
      db.transaction().execute(async (trx) => {
        await insert(trx, 'second')
        await t.rejects(third(), { message: 'third' })
        await insert(db, 'second again')
      })
    const first = () =>
      db.transaction().execute(async () => {
        await insert(db, 'first')
        await second()
        await insert(db, 'first again')
      })
    await first()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['first', 'second', 'second again', 'first again'])
  t.equal(proxy.sessions.length, 1)
})

test('when the middle of three fails, the innermost, though it succeeded, goes with it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(async () => {
      await insert(db, 'outer')
      await t.rejects(
        db.transaction().execute(async () => {
          await insert(db, 'middle')
          await db.transaction().execute(() => insert(db, 'innermost'))
          throw new Error('middle')
        }),
      )
      await insert(db, 'outer again')
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['outer', 'outer again'])
})

test('a nested transaction cannot have an isolation level or access mode of its own', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const refused = { code: 'FST_REQUEST_DB_NESTED_CONFLICT', statusCode: 500 }
    const never = async () => t.fail('the callback ran')
    await t.rejects(db.transaction().setIsolationLevel('serializable').execute(never), refused)
    await t.rejects(db.transaction().setAccessMode('read only').execute(never), refused)
    await t.rejects(db.startTransaction().setIsolationLevel('serializable').execute(), refused)
    t.equal(db.state, 'idle')
    await insert(db, 'A')
    await t.rejects(db.transaction().setIsolationLevel('serializable').execute(never), refused)
    await insert(db, 'B')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
  t.notMatch(proxy.statements().flat(), [/SAVEPOINT/])
  t.equal(proxy.flights.length, 3)
})

for (const what of ['commit', 'rollback', 'begin'] as const) {
  test(`${what}() inside a nested transaction is refused and changes nothing`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'A')
      await db.transaction().execute(async () => {
        await insert(db, 'B')
        await t.rejects(db[what](), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
        await insert(db, 'C')
      })
      t.equal(db.state, 'begun')
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.strictSame(await notes(), ['A', 'B', 'C'])
  })
}

test('a statement that nobody awaits belongs to the savepoint it was issued in', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(async (trx) => {
      void insert(trx, 'kept')
    })
    await t.rejects(
      db.transaction().execute(async (trx) => {
        insert(trx, 'gone').catch(() => {})
        throw new Error('inner')
      }),
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['kept'])
})

test('a statement that nobody awaits and that fails takes its nested transaction along', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await t.rejects(
      db.transaction().execute(async (trx) => {
        await insert(trx, 'B')
        sql`select 1 / 0`.execute(trx).catch(() => {})
      }),
    )
    await insert(db, 'C')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'C'])
})

test('a nested transaction waits for the one that was begun in it and not awaited', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(async () => {
      await insert(db, 'outer')
      void db.transaction().execute(async () => {
        await insert(db, 'inner')
        await insert(db, 'inner again')
      })
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['outer', 'inner', 'inner again'])
})

test('a callback that does nothing is a savepoint set and released', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => db.transaction().execute(async () => 'ok'))
  t.equal((await post()).body, 'ok')
  t.match(proxy.statements(), [['BEGIN', /^SAVEPOINT/], [/^RELEASE/], ['COMMIT']])
})

test('Kysely knows what is a transaction and what is not', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    t.equal(db.isTransaction, false)
    await db.transaction().execute(async (trx) => {
      t.equal(trx.isTransaction, true)
      t.throws(() => trx.transaction())
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('a nested transaction of a session in autocommit-free read-only mode reads, and its write is refused', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      t.strictSame(await db.transaction().execute((trx) => trx.selectFrom('notes').selectAll().execute()), [])
      await t.rejects(
        db.transaction().execute((trx) => insert(trx, 'x')),
        { code: '25006' },
      )
      return db.selectFrom('notes').selectAll().execute()
    },
    { readOnly: true },
  )
  t.strictSame((await post()).json(), [])
})

test('a backend killed inside a nested transaction: 503, nothing kept, nothing said to the dead', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      await insert(db, 'A')
      await db.transaction().execute(async (trx) => {
        const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(trx)
        await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
        await insert(trx, 'B')
      })
      return 'not reached'
    },
    { pool: { size: 1 } },
  )
  const pid = proxy.sessions[0]?.pid
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
  t.notOk(
    proxy
      .statements()
      .flat()
      .some((text) => text.startsWith('ROLLBACK')),
  )
  await app.db.ping()
  t.not(proxy.sessions.at(-1)?.pid, pid, 'the connection is gone')
})

test('a backend killed inside a nested transaction whose error is swallowed: still 503, and no new transaction', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await t.rejects(
      db.transaction().execute(async (trx) => {
        const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(trx)
        await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
        await insert(trx, 'B')
      }),
      { code: 'FST_REQUEST_DB_CONNECTION_LOST' },
    )
    await t.rejects(insert(db, 'C'), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
    await t.rejects(
      db.transaction().execute(() => insert(db, 'D')),
      { code: 'FST_REQUEST_DB_CONNECTION_LOST' },
    )
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
})
