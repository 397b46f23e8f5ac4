import { type Generated, type Insertable, type Selectable, sql } from 'kysely'
import pg from 'pg'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// What goes in comes out: parameters, rows, counts.

type Things = {
  id: Generated<number>
  at: Date | null
  body: unknown
  tags: string[] | null
  matrix: number[][] | null
  bytes: Buffer | null
  big: bigint | string | null
  amount: string | null
  flag: boolean | null
}
const database = await createDatabase(t, {
  sql: `${NOTES}; create table things (
    id int generated always as identity primary key, at timestamptz, body jsonb, tags text[], matrix int[][], bytes bytea,
    big bigint, amount numeric, flag boolean)`,
})
const things = (db: Session) => db.withTables<{ things: Things }>()

t.beforeEach(() => database.query('truncate notes, things restart identity'))

const VALUES: [string, Insertable<Things>, Partial<Selectable<Things>>?][] = [
  ['a Date', { at: new Date('2024-02-29T12:34:56.789Z') }],
  ['an object as JSON', { body: { nested: { list: [1, 'two', null], quote: "it's" } } }],
  ['a string as JSON', { body: JSON.stringify('text') }, { body: 'text' }],
  ['a list as JSON', { body: JSON.stringify([1, { two: 2 }]) }, { body: [1, { two: 2 }] }],
  ['an array of text with quotes, commas, braces and null', { tags: ['a', 'b,c', '{d}', '"e"', '\\', ''] }],
  ['an empty array', { tags: [] }],
  [
    'an array of arrays',
    {
      matrix: [
        [1, 2],
        [3, 4],
      ],
    },
  ],
  ['bytes', { bytes: Buffer.from([0, 1, 255, 92, 39]) }],
  ['no bytes', { bytes: Buffer.alloc(0) }],
  ['a bigint', { big: 9_007_199_254_740_993n }, { big: '9007199254740993' }],
  ['a numeric', { amount: '12345678901234567890.123456789' }],
  ['true', { flag: true }],
  ['false', { flag: false }],
  ['null everywhere', { at: null, tags: null, bytes: null, big: null, amount: null, flag: null }],
]

for (const [name, written, read] of VALUES) {
  test(`${name} comes back as it went in`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      const row = await things(db).insertInto('things').values(written).returningAll().executeTakeFirstOrThrow()
      for (const [column, value] of Object.entries(read ?? written))
        t.strictSame(row[column as keyof Things], value, column)
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
  })
}

test('undefined in an insert is the default, as Kysely has it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await things(db)
      .insertInto('things')
      .values([{ flag: true }, { flag: undefined as unknown as null }])
      .execute()
    return things(db).selectFrom('things').select('flag').orderBy('id').execute()
  })
  t.strictSame((await post()).json(), [{ flag: true }, { flag: null }])
})

test('texts of every kind: empty, long, with quotes, with characters of four bytes', async (t) => {
  const texts = ['', "it's", '"', '$1', '\\', '👩‍🚀 ünïcödé', 'x'.repeat(1_000_000)]
  const { post } = await oneRoute(t, database, async (db) => {
    await db
      .insertInto('notes')
      .values(texts.map((note) => ({ note })))
      .execute()
    const rows = await db.selectFrom('notes').select('note').orderBy('id').execute()
    t.strictSame(
      rows.map(({ note }) => note),
      texts,
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('hundreds of parameters in one statement', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db
      .insertInto('notes')
      .values(Array.from({ length: 5000 }, (_, n) => ({ note: `${n}` })))
      .execute()
    return db
      .selectFrom('notes')
      .select(({ fn }) => fn.countAll<string>().as('n'))
      .executeTakeFirst()
  })
  t.strictSame((await post()).json(), { n: '5000' })
})

test('more parameters than the protocol has room for are an error, and the connection survives', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    (db) =>
      db
        .insertInto('notes')
        .values(Array.from({ length: 70_000 }, (_, n) => ({ note: `${n}` })))
        .execute(),
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 500)
  t.strictSame(await database.rows('notes'), [])
  t.match(await app.db.session((db) => sql`select 1 as one`.execute(db)), { rows: [{ one: 1 }] })
})

test('an object with toPostgres is asked for its text', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const point = { toPostgres: (prepare: (value: unknown) => unknown) => prepare({ x: 1 }) }
    const { rows } = await sql`select ${point}::jsonb as body`.execute(db)
    return rows
  })
  t.strictSame((await post()).json(), [{ body: { x: 1 } }])
})

test('counts: inserted, updated, deleted, merged, and none for a select', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const inserted = await db
      .insertInto('notes')
      .values([{ note: 'a' }, { note: 'b' }, { note: 'c' }])
      .executeTakeFirst()
    t.equal(inserted.numInsertedOrUpdatedRows, 3n)
    const updated = await db.updateTable('notes').set({ note: 'x' }).where('note', '<', 'c').executeTakeFirst()
    t.equal(updated.numUpdatedRows, 2n)
    const none = await db.updateTable('notes').set({ note: 'x' }).where('id', '<', 0).executeTakeFirst()
    t.equal(none.numUpdatedRows, 0n)
    const merged = await db
      .mergeInto('notes as target')
      .using('notes as source', 'source.id', 'target.id')
      .whenMatched()
      .thenUpdateSet({ note: 'merged' })
      .executeTakeFirst()
    t.equal(merged.numChangedRows, 3n)
    const deleted = await db.deleteFrom('notes').executeTakeFirst()
    t.equal(deleted.numDeletedRows, 3n)
    const selected = await sql`select 1`.execute(db)
    t.equal(selected.numAffectedRows, undefined)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('returning gives the rows, and executeTakeFirstOrThrow throws where there are none', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const rows = await db
      .insertInto('notes')
      .values([{ note: 'a' }, { note: 'b' }])
      .returning(['id', 'note'])
      .execute()
    t.strictSame(rows, [
      { id: 1, note: 'a' },
      { id: 2, note: 'b' },
    ])
    await t.rejects(db.selectFrom('notes').selectAll().where('id', '<', 0).executeTakeFirstOrThrow(), /no result/)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('the type parsers of the connection option are used, and only there', async (t) => {
  const types: pg.CustomTypesConfig = {
    getTypeParser: (oid: number, format?: 'text' | 'binary') =>
      oid === pg.types.builtins.INT8 ? (text: string) => BigInt(text) : pg.types.getTypeParser(oid, format as 'text'),
  }
  const handler = async (db: Session) => {
    const { rows } = await sql<{ big: unknown }>`select 42::int8 as big`.execute(db)
    const streamed: unknown[] = []
    const chunks = things(db).selectFrom('things').select('big').stream(1)
    for await (const { big } of chunks) streamed.push(big)
    return [typeof rows[0]?.big, ...streamed.map((big) => typeof big)]
  }
  await database.query('insert into things (big) values (1), (2)')
  const { connectionString } = database
  const own = await oneRoute(t, database, handler, { connection: { connectionString, types } })
  t.strictSame((await own.post()).json(), ['bigint', 'bigint', 'bigint'])
  const plain = await oneRoute(t, database, handler)
  t.strictSame((await plain.post()).json(), ['string', 'string', 'string'])
})

test('a type parser that throws fails its statement alone, and the transaction is as good as before', async (t) => {
  const types: pg.CustomTypesConfig = {
    getTypeParser: (oid: number, format?: 'text' | 'binary') => {
      if (oid !== pg.types.builtins.INT8) return pg.types.getTypeParser(oid, format as 'text')
      return () => {
        throw new RangeError('unreadable')
      }
    },
  }
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await db.insertInto('notes').values({ note: 'kept' }).execute()
      const settled = await Promise.allSettled([
        sql`select 1::int4 as n`.execute(db),
        sql`select n::int8 from generate_series(1, 3) n`.execute(db),
        sql`select 3::int4 as n`.execute(db),
      ])
      t.match(settled, [
        { value: { rows: [{ n: 1 }] } },
        { status: 'rejected', reason: { message: 'unreadable' } },
        { value: { rows: [{ n: 3 }] } },
      ])
      return 'ok'
    },
    { connection: { connectionString: database.connectionString, types } },
  )
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'kept' }])
})

test('an empty statement has no rows and does no harm', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    t.strictSame((await sql``.execute(db)).rows, [])
    t.strictSame((await sql`-- only a comment`.execute(db)).rows, [])
    t.strictSame((await sql`select from notes`.execute(db)).rows, [])
    return sql`select 1 as one`.execute(db)
  })
  t.match((await post()).json(), { rows: [{ one: 1 }] })
})

test('a row of no columns, columns of one name, names of all kinds', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    t.strictSame((await sql`select`.execute(db)).rows, [{}])
    t.strictSame((await sql`select 1 as n, 2 as n`.execute(db)).rows, [{ n: 2 }])
    const odd = (await sql`select 1 as "__proto__", 2 as "constructor", 3 as "a b"`.execute(db)).rows[0] as object
    t.equal(Object.getOwnPropertyDescriptor(odd, 'a b')?.value, 3)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

for (const [what, statement, code] of [
  ['a NUL byte in a text', sql`insert into notes (note) values (${'a\0b'})`, '22021'],
  ['a uuid that is none', sql`select ${'not a uuid'}::uuid`, '22P02'],
  ['a number that does not fit', sql`select ${'99999999999'}::int`, '22003'],
  ['a type that nobody can tell', sql`select ${null}`, undefined],
] as const) {
  test(`${what}: ${code ?? 'is no error'}, and the connection is reused`, async (t) => {
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await db.insertInto('notes').values({ note: 'before' }).execute()
        await statement.execute(db)
        return 'ok'
      },
      { pool: { size: 1 } },
    )
    const answer = await post()
    if (code === undefined) t.equal(answer.statusCode, 200)
    else {
      t.match(answer.json(), { statusCode: 500, code })
      t.strictSame(await database.rows('notes'), [])
    }
    t.equal((await post()).statusCode, answer.statusCode)
    t.match(app.db.snapshot().totals, { opened: 1 })
  })
}

test('fewer values than placeholders, and more: 08P01, and the connection is reused', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      const bind = (text: string, parameters: unknown[]) =>
        db.executeQuery({ ...sql.raw(text).compile(db), parameters })
      await t.rejects(bind('select $1::int', []), { code: '08P01' })
      await db.rollback()
      await t.rejects(bind('select $1::int', [1, 2]), { code: '08P01' })
      await db.rollback()
      return (await bind('select $1::int as n', [1])).rows
    },
    { pool: { size: 1 } },
  )
  t.strictSame((await post()).json(), [{ n: 1 }])
  t.match(app.db.snapshot().totals, { opened: 1 })
})
