import { CamelCasePlugin, Kysely, ParseJSONResultsPlugin, sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// All of Kysely works on a session, and what is derived from one is one.

const database = await createDatabase(t, {
  sql: `${NOTES}; create schema other; create table other.notes (like notes including all)`,
})
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async (table = 'notes') => (await database.rows<{ note: string }>(table)).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes, other.notes restart identity'))

test('a session is a Kysely', async (t) => {
  const { post } = await oneRoute(t, database, (db) => {
    t.ok(db instanceof Kysely)
    t.equal(db.isTransaction, false)
    t.equal(db.getExecutor().adapter.supportsReturning, true)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

const DERIVED: [string, (db: Session) => Session][] = [
  ['withSchema', (db) => db.withSchema('other')],
  ['withPlugin', (db) => db.withPlugin(new ParseJSONResultsPlugin())],
  ['withoutPlugins', (db) => db.withoutPlugins()],
  ['withTables', (db) => db.withTables<{ more: { id: number } }>() as Session],
]
for (const [name, derive] of DERIVED) {
  test(`what ${name} returns is a session: the same transaction, with all its methods`, async (t) => {
    const called: string[] = []
    const { post } = await oneRoute(t, database, async (db) => {
      const derived = derive(db)
      t.ok(derived instanceof db.constructor)
      t.equal(derived.state, 'idle')
      derived.add(derived.insertInto('notes').values({ note: 'added' }))
      await derived.flush()
      t.strictSame([db.state, derived.state, derived.inTransaction], ['begun', 'begun', true])
      await derived.transaction().execute((trx) => insert(trx, 'nested'))
      await derived.withClient((client) => client.query('select 1'))
      derived.afterCommit(() => called.push('committed'))
      derived.afterRollback(() => called.push('rolled back'))
      await derived.commit()
      t.equal(db.state, 'idle')
      await derived.begin()
      await insert(derived, 'dropped')
      await derived.rollback()
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.strictSame(await notes(name === 'withSchema' ? 'other.notes' : 'notes'), ['added', 'nested'])
    t.strictSame(called, ['committed'])
  })
}

test('derivations of derivations keep what was derived', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const derived = db.withSchema('other').withPlugin(new CamelCasePlugin()).withTables<{ more: { id: number } }>()
    derived.add(derived.insertInto('notes').values({ note: 'a' }))
    t.match(derived.insertInto('notes').values({ note: 'a' }).compile().sql, /"other"\."notes"/)
    t.notMatch(derived.withoutPlugins().insertInto('notes').values({ note: 'a' }).compile().sql, /other/)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes('other.notes'), ['a'])
})

test('the plugins of the option hold for statements, nested transactions, streams and writes that are added', async (t) => {
  await database.query('create table spelled_out (row_id int, long_name text)')
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const session = db.withTables<{ spelledOut: { rowId: number; longName: string } }>()
      await session.insertInto('spelledOut').values({ rowId: 1, longName: 'first' }).execute()
      session.add(session.insertInto('spelledOut').values({ rowId: 2, longName: 'second' }))
      await session
        .transaction()
        .execute((trx) => trx.insertInto('spelledOut').values({ rowId: 3, longName: 'third' }).execute())
      const streamed: string[] = []
      for await (const { longName } of session.selectFrom('spelledOut').select('longName').orderBy('rowId').stream(1)) {
        streamed.push(longName)
      }
      return streamed
    },
    { plugins: [new CamelCasePlugin()] },
  )
  t.strictSame((await post()).json(), ['first', 'second', 'third'])
})

test('joins, common table expressions, subqueries, unions, case, fn, dynamic, raw', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db
      .insertInto('notes')
      .values([{ note: 'a' }, { note: 'b' }])
      .execute()
    const joined = await db
      .with('firsts', (qb) => qb.selectFrom('notes').select('id').where('id', '=', 1))
      .selectFrom('firsts')
      .innerJoin('notes', 'notes.id', 'firsts.id')
      .select(({ fn, eb }) => [
        'notes.note',
        fn.countAll<string>().over().as('n'),
        eb.case().when('notes.id', '=', 1).then('one').else('other').end().as('word'),
      ])
      .union(db.selectNoFrom([sql<string>`'u'`.as('note'), sql<string>`'0'`.as('n'), sql<string>`'x'`.as('word')]))
      .orderBy('note')
      .execute()
    t.strictSame(joined, [
      { note: 'a', n: '1', word: 'one' },
      { note: 'u', n: '0', word: 'x' },
    ])
    const { ref } = db.dynamic
    t.match(await db.selectFrom('notes').select(ref<'note'>('note')).execute(), [{ note: 'a' }, { note: 'b' }])
    t.match(await db.selectFrom('notes').selectAll().explain('json'), [{ 'QUERY PLAN': [{}] }])
    t.equal((await db.executeQuery(db.selectFrom('notes').selectAll().compile())).rows.length, 2)
    t.equal(
      await db
        .selectFrom('notes')
        .selectAll()
        .executeTakeFirst()
        .then((row) => row?.note),
      'a',
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('the schema builder and the introspector work inside the transaction', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.schema
      .createTable('made_here')
      .addColumn('id', 'integer', (column) => column.primaryKey())
      .execute()
    const tables = await db.introspection.getTables()
    t.ok(tables.some(({ name }) => name === 'made_here'))
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  t.strictSame(await database.query("select to_regclass('made_here') as made"), [{ made: null }])
})

test('request.db is one session, however often it is asked for', async (t) => {
  const { post } = await oneRoute(t, database, (db, request) => {
    t.equal(request.db, db)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('fastify.db.kysely needs no session: each statement its own, transactions real ones', async (t) => {
  const { app } = await oneRoute(t, database, () => 'unused', { pool: { size: 2 } })
  const { kysely } = app.db
  await insert(kysely, 'a')
  t.strictSame(await notes(), ['a'])
  await t.rejects(
    kysely.transaction().execute(async (trx) => {
      await insert(trx, 'b')
      throw new Error('mine')
    }),
  )
  await kysely
    .transaction()
    .setIsolationLevel('serializable')
    .execute((trx) => insert(trx, 'c'))
  t.strictSame(await notes(), ['a', 'c'])
  const streamed: string[] = []
  for await (const { note } of kysely.selectFrom('notes').select('note').stream(1)) streamed.push(note)
  t.strictSame(streamed, ['a', 'c'])
  for await (const _ of kysely.selectFrom('notes').select('note').stream(1)) break
  const trx = await kysely.startTransaction().execute()
  await insert(trx, 'd')
  await trx.rollback().execute()
  await kysely.connection().execute(async (connection) => {
    const pid = async () =>
      (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(connection)).rows[0]?.pid
    t.equal(await pid(), await pid())
  })
  await kysely.destroy()
  await insert(kysely, 'e')
  t.strictSame(await notes(), ['a', 'c', 'e'])
  t.equal(app.db.snapshot().checkedOut, 0)
})
