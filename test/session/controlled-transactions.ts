import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// startTransaction(), connection() and destroy(): Kysely's roads past a callback.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('a controlled transaction is a savepoint, kept or dropped by its handle', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const kept = await db.startTransaction().execute()
    await insert(kept, 'kept')
    await kept.commit().execute()
    const dropped = await db.startTransaction().execute()
    await insert(dropped, 'dropped')
    await dropped.rollback().execute()
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['kept', 'after'])
  t.match(proxy.statements().slice(0, 3), [['BEGIN', /^SAVEPOINT/], [/^insert/], [/^RELEASE/]])
})

test('what a controlled transaction has committed goes with the request', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const trx = await db.startTransaction().execute()
    await insert(trx, 'a')
    await trx.commit().execute()
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  t.strictSame(await notes(), [])
})

test('its own savepoints: savepoint, rollbackToSavepoint, releaseSavepoint', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const trx = await db.startTransaction().execute()
    await insert(trx, 'a')
    const after = await trx.savepoint('odd "name"').execute()
    await insert(after, 'b')
    await t.rejects(sql`select 1 / 0`.execute(after), { code: '22012' })
    const before = await after.rollbackToSavepoint('odd "name"').execute()
    await insert(before, 'c')
    const second = await before.savepoint('second').execute()
    await insert(second, 'd')
    await second.releaseSavepoint('second').execute()
    await trx.commit().execute()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'c', 'd'])
})

test('while one is open the session itself refuses statements, at once', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const trx = await db.startTransaction().execute()
    const refused = { code: 'FST_REQUEST_DB_NESTED_CONFLICT' }
    await t.rejects(insert(db, 'b'), refused)
    await t.rejects(
      db.transaction().execute(() => insert(db, 'c')),
      refused,
    )
    await t.rejects(db.startTransaction().execute(), refused)
    await t.rejects(
      db.withClient(async () => {}),
      refused,
    )
    await t.rejects(db.commit(), refused)
    await t.rejects(db.rollback(), refused)
    await insert(trx, 'd')
    await trx.commit().execute()
    await insert(db, 'e')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'd', 'e'])
})

test('one that is left open: 500, and nothing is kept', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      const trx = await db.startTransaction().execute()
      await insert(trx, 'b')
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.strictSame(await notes(), [])
  t.equal((await post()).statusCode, 500)
  t.match(app.db.snapshot().totals, { opened: 1 })
})

test("one that is left open by a handler that throws: the handler's error", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const trx = await db.startTransaction().execute()
    await insert(trx, 'b')
    throw new Error('mine')
  })
  t.match((await post()).json(), { statusCode: 500, message: 'mine' })
  t.strictSame(await notes(), [])
})

test('after its end its handle is refused, and after the request too', async (t) => {
  let kept: Awaited<ReturnType<ReturnType<Session['startTransaction']>['execute']>> | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    const trx = await db.startTransaction().execute()
    await insert(trx, 'a')
    await trx.commit().execute()
    await t.rejects(insert(trx, 'b'))
    await t.rejects(async () => trx.rollback().execute())
    kept = await db.startTransaction().execute()
    return 'left open'
  })
  t.equal((await post()).statusCode, 500)
  await t.rejects(insert(kept!, 'c'))
  await t.rejects(async () => kept!.commit().execute())
  t.strictSame(await notes(), [])
})

test('a controlled transaction inside the callback of a nested one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(async () => {
      await insert(db, 'a')
      const trx = await db.startTransaction().execute()
      await insert(trx, 'b')
      await t.rejects(insert(db, 'x'), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
      await trx.rollback().execute()
      await insert(db, 'c')
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'c'])
})

test('a controlled transaction nobody ended inside the callback of a nested one ends with that', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      await t.rejects(
        db.transaction().execute(async () => {
          await insert(db, 'b')
          const trx = await db.startTransaction().execute()
          await insert(trx, 'c')
          throw new Error('inner')
        }),
      )
      await insert(db, 'd')
      return 'ok'
    },
    { pool: { timeoutMillis: 500 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'd'])
})

test('a nested transaction that succeeds around a controlled one nobody ended keeps nothing of it and does not hang', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await db.transaction().execute(async () => {
        const trx = await db.startTransaction().execute()
        await insert(trx, 'a')
      })
      return 'went on'
    },
    { pool: { timeoutMillis: 300 } },
  )
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.strictSame(await notes(), [])
})

test('a controlled transaction in an autocommit session is a real one', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      const trx = await db.startTransaction().setIsolationLevel('serializable').execute()
      await insert(trx, 'a')
      await insert(db, 'beside')
      t.strictSame(await notes(), ['beside'])
      await trx.commit().execute()
      const dropped = await db.startTransaction().execute()
      await insert(dropped, 'b')
      await dropped.rollback().execute()
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['a', 'beside'])
  t.match(proxy.statements()[0], ['BEGIN ISOLATION LEVEL SERIALIZABLE', /^insert/])
})

test('a controlled transaction left open in an autocommit session is rolled back, and the answer says so', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const trx = await db.startTransaction().execute()
      await insert(trx, 'a')
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.strictSame(await notes(), [])
})

test('connection().execute(fn) is the connection and the transaction of the session', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    const pid = async (kysely: Pick<Session, 'getExecutor'>) =>
      (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(kysely as Session)).rows[0]?.pid
    const before = await pid(db)
    await db.connection().execute(async (connection) => {
      t.equal(await pid(connection), before)
      await insert(connection, 'a')
      await insert(db, 'b')
    })
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  t.strictSame(await notes(), [])
  t.match(app.db.snapshot().totals, { checkouts: 1 })
})

test('a transaction on what connection() hands out is a savepoint too', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.connection().execute(async (connection) => {
      await connection.transaction().execute((trx) => insert(trx, 'a'))
      await connection
        .transaction()
        .execute(async (trx) => {
          await insert(trx, 'b')
          throw new Error('inner')
        })
        .catch(() => {})
      await insert(connection, 'c')
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'c'])
})

test('an error in connection().execute(fn) reaches the handler, and the session goes on', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await t.rejects(
      db.connection().execute(async (connection) => {
        await insert(connection, 'a')
        throw new Error('inner')
      }),
      { message: 'inner' },
    )
    await insert(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b'])
})

test('destroy() of a session ends nothing', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      await db.destroy()
      await db.withSchema('public').destroy()
      await insert(db, 'b')
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b', 'a', 'b'])
  t.match(app.db.snapshot().totals, { opened: 1 })
})
