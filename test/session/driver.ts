import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { sessionDialect, sessionDriver } from '../../lib/session/driver.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('the driver has nothing of its own: no connection to give, none to take, nothing to end', async (t) => {
  await sessionDriver.init()
  await t.rejects(sessionDriver.acquireConnection())
  await sessionDriver.releaseConnection(undefined as never)
  await sessionDriver.destroy()
})

test("the dialect is PostgreSQL's on that driver", async (t) => {
  t.equal(sessionDialect.createDriver(), sessionDriver)
  t.equal(sessionDialect.createAdapter().supportsReturning, true)
  t.ok(sessionDialect.createQueryCompiler())
  t.ok(sessionDialect.createIntrospector({} as never))
})

test('counts come with writes, rows with what returns them', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const counted = await sql`insert into notes (note) values ('a'), ('b')`.execute(db)
    t.strictSame([counted.numAffectedRows, counted.rows], [2n, []])
    const returned = await sql`update notes set note = note returning id`.execute(db)
    t.strictSame([returned.numAffectedRows, returned.rows], [2n, [{ id: 1 }, { id: 2 }]])
    const selected = await sql`select 1 as one`.execute(db)
    t.strictSame([selected.numAffectedRows, selected.rows], [undefined, [{ one: 1 }]])
    const nothing = await sql``.execute(db)
    t.strictSame([nothing.numAffectedRows, nothing.rows], [undefined, []])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('transactions of Kysely are savepoints in a session, real ones in an autocommit session', async (t) => {
  const handler = async (db: Session) => {
    await db.transaction().execute((trx) => insert(trx, 'kept'))
    await t.rejects(
      db.transaction().execute(async (trx) => {
        await insert(trx, 'dropped')
        throw new Error('inner')
      }),
    )
    const trx = await db.startTransaction().execute()
    const inside = await trx.savepoint('s').execute()
    await insert(inside, 'rolled back')
    await (await inside.rollbackToSavepoint('s').execute()).releaseSavepoint('s').execute()
    await trx.commit().execute()
    return 'ok'
  }
  const inTransaction = await oneRoute(t, database, handler)
  t.equal((await inTransaction.post()).statusCode, 200)
  const alone = await oneRoute(t, database, handler, { route: { autocommit: true } })
  t.equal((await alone.post()).statusCode, 200)
  t.strictSame(await notes(), ['kept', 'kept'])
})

test('settings of its own are for the transactions of an autocommit session only', async (t) => {
  const isolation = (trx: Session) =>
    sql<{ level: string }>`select current_setting('transaction_isolation') as level`.execute(trx)
  const handler = async (db: Session) => {
    const { rows } = await db
      .transaction()
      .setIsolationLevel('serializable')
      .setAccessMode('read only')
      .execute((trx) => isolation(trx as unknown as Session))
    return rows
  }
  const alone = await oneRoute(t, database, handler, { route: { autocommit: true } })
  t.strictSame((await alone.post()).json(), [{ level: 'serializable' }])
  const inTransaction = await oneRoute(t, database, handler)
  t.match((await inTransaction.post()).json(), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
})

test('streams read in chunks, in a transaction of their own where the session has none', async (t) => {
  await database.query("insert into notes (note) values ('a'), ('b'), ('c')")
  const handler = async (db: Session) => {
    const read: string[] = []
    for await (const { note } of db.selectFrom('notes').select('note').stream(2)) read.push(note)
    for await (const _ of db.selectFrom('notes').select('note').stream(1)) break
    await t.rejects(async () => db.selectFrom('notes').select('note').stream(0).next(), { name: 'RangeError' })
    return read
  }
  for (const autocommit of [false, true]) {
    const { post } = await oneRoute(t, database, handler, { route: { autocommit } })
    t.strictSame((await post()).json(), ['a', 'b', 'c'])
  }
})

test('Kysely may ask for what runs to be cancelled', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const sleeping = sql`select pg_sleep(30)`.execute(db)
    sleeping.catch(() => {})
    await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep')))
    const cancel = (connection: unknown) => (connection as { cancelQuery(): Promise<void> }).cancelQuery()
    await db.getExecutor().provideConnection(cancel)
    await t.rejects(sleeping, { code: '57014' })
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
})

test('errors name the code that asked', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const asks = async () => await sql`select 1 / 0`.execute(db)
    t.match(((await asks().catch((error: unknown) => error)) as Error).stack, /asks.*driver\.ts/s)
    await db.rollback()
    const throwsText = {
      toPostgres() {
        throw 'a text, no error'
      },
    }
    t.equal(await sql`select ${throwsText}`.execute(db).catch((error: unknown) => error), 'a text, no error')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})
