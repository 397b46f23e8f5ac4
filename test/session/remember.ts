import { CamelCasePlugin, sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { add } from '../support/notebook.ts'
import { oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* db.remember(query): the same read is made once in a session, until something is written. */

const database = await createDatabase(t, {
  sql: `${NOTES};
    create table odd (at timestamptz, bytes bytea, body json, list int[], big_number bigint)`,
})
t.beforeEach(async () => {
  await database.query('delete from notes')
  await database.query("insert into notes (note) values ('one')")
})

const all = (db: Session) => db.selectFrom('notes').select('note').orderBy('id')
const texts = async (db: Session) => (await db.remember(all(db))).map(({ note }) => note)

/** How many selects the server got while `fn` ran in a session. */
async function selects(t: Test, fn: (db: Session) => Promise<unknown>): Promise<number> {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await fn(db)
    return 'ok'
  })
  const answer = await post()
  t.equal(answer.statusCode, 200, answer.body)
  return proxy
    .statements()
    .flat()
    .filter((text) => text.startsWith('select "note"')).length
}

test('the second who asks gets the rows of the first', async (t) => {
  const count = await selects(t, async (db) => {
    t.strictSame(await texts(db), ['one'])
    t.strictSame(await texts(db), ['one'])
  })
  t.equal(count, 1)
})

test('an auth hook and its handler load the same user once', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    const user = (db: Session) => db.remember(db.selectFrom('notes').selectAll().where('note', '=', 'one'))
    app.addHook('preHandler', async ({ db }, reply) => {
      const [found] = await user(db)
      if (!found) return reply.code(401).send()
    })
    app.get('/', async ({ db }) => ({
      user: (await user(db))[0]?.note,
      statements: app.db.snapshot().holders[0]?.statements,
    }))
  })
  t.strictSame((await app.inject('/')).json(), { user: 'one', statements: 1 })
})

test('those who ask at the same time share one read', async (t) => {
  const count = await selects(t, async (db) => {
    const answers = await Promise.all(Array.from({ length: 5 }, () => texts(db)))
    t.strictSame(answers, Array(5).fill(['one']))
  })
  t.equal(count, 1)
})

test('other SQL, other values and other plugins are other reads', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (db) => {
    const by = (note: string) => db.remember(db.selectFrom('notes').select('note').where('note', '=', note))
    t.equal((await by('one')).length, 1)
    t.equal((await by('two')).length, 0)
    const snake = sql<{ a_b: number }>`select 1 as a_b`
    t.strictSame(await db.remember(snake.compile(db)), [{ a_b: 1 }])
    t.strictSame(await db.withPlugin(new CamelCasePlugin()).remember(snake.compile(db)), [{ aB: 1 }])
    t.strictSame(await db.remember(snake.compile(db)), [{ a_b: 1 }])
  })
})

/** Ways to change what a read would answer. Each makes the notes 'one' and 'two', or says what else they are then. */
const CHANGES: Record<string, [(db: Session) => Promise<unknown>, string[]]> = {
  'an insert': [(db) => add(db, 'two'), ['one', 'two']],
  'an update': [(db) => db.updateTable('notes').set({ note: 'ONE' }).execute(), ['ONE']],
  'a delete': [(db) => db.deleteFrom('notes').execute(), []],
  'raw SQL': [(db) => sql`insert into notes (note) values ('two')`.execute(db), ['one', 'two']],
  'a select whose WITH writes': [
    (db) =>
      db
        .with('written', (db) => db.insertInto('notes').values({ note: 'two' }).returning('id'))
        .selectFrom('written')
        .selectAll()
        .execute(),
    ['one', 'two'],
  ],
  'add()': [async (db) => db.add(db.insertInto('notes').values({ note: 'two' })), ['one', 'two']],
  'the raw client': [
    (db) => db.withClient((client) => client.query("insert into notes (note) values ('two')")),
    ['one', 'two'],
  ],
  'a write in a nested transaction': [(db) => db.transaction().execute((trx) => add(trx, 'two')), ['one', 'two']],
  'a nested transaction that is rolled back': [
    (db) =>
      db
        .transaction()
        .execute(async (trx) => {
          await add(trx, 'two')
          t.strictSame(await texts(db), ['one', 'two'], 'inside, its own write is seen')
          throw new Error('no')
        })
        .catch(() => {}),
    ['one'],
  ],
  'rollback()': [(db) => db.rollback(), ['one']],
  'commit()': [(db) => db.commit(), ['one']],
  'a stream that writes': [
    async (db) => {
      for await (const _ of db.insertInto('notes').values({ note: 'two' }).returning('id').stream());
    },
    ['one', 'two'],
  ],
}

for (const [what, [change, expected]] of Object.entries(CHANGES)) {
  test(`${what} throws it away`, async (t) => {
    let before = 0
    const count = await selects(t, async (db) => {
      await texts(db)
      await change(db)
      t.strictSame(await texts(db), expected)
      before++
      t.strictSame(await texts(db), expected, 'and what was read then is remembered again')
    })
    t.equal(before, 1)
    t.equal(count, what === 'a nested transaction that is rolled back' ? 3 : 2)
  })
}

test('reads throw nothing away, nor does a nested transaction that reads', async (t) => {
  const count = await selects(t, async (db) => {
    await texts(db)
    await db.selectFrom('notes').selectAll().execute()
    for await (const _ of db.selectFrom('notes').selectAll().stream());
    await db.transaction().execute(() => texts(db))
    await texts(db)
  })
  t.equal(count, 1)
})

test('a write between the asking and the answer leaves nothing remembered that is older', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (db) => {
    const [before] = await Promise.all([texts(db), add(db, 'two')])
    t.strictSame(before, ['one'])
    t.strictSame(await texts(db), ['one', 'two'])
  })
})

test('nothing is shared between sessions', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (first) => {
    t.strictSame(await texts(first), ['one'])
    await app.db.session((second) => add(second, 'two'))
    await app.db.session(async (second) => t.strictSame(await texts(second), ['one', 'two']))
    t.strictSame(await texts(first), ['one'], 'the first still has what it has read')
  })
})

test('each gets rows of its own: what one changes is not what the other sees', async (t) => {
  await database.query('delete from odd')
  await database.query(
    `insert into odd values ('2026-01-01Z', '\\x0102', '{"a":{"b":[1]}}', '{1,2}', 9007199254740993)`,
  )
  type Odd = {
    odd: { at: Date; bytes: Buffer; body: { a: { b: number[] } }; list: number[]; big_number: string }
  }
  const app = await buildApp(t, database)
  await app.db.session(async (session) => {
    const db = session.withTables<Odd>()
    const read = () => db.remember(db.selectFrom('odd').selectAll())
    const [plain] = await db.selectFrom('odd').selectAll().execute()
    const [first] = await read()
    t.strictSame(first, plain, 'a copy is like the original')
    first!.at.setFullYear(1999)
    first!.bytes[0] = 9
    first!.body.a.b.push(2)
    first!.list.push(3)
    first!.big_number = ''
    const [second] = await read()
    t.strictSame(second, plain)
    t.ok(Buffer.isBuffer(second!.bytes))
  })
})

test('a read that fails is not remembered, and everybody who asked hears of it', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (db) => {
    let attempt = 0
    const query = sql<{ n: number }>`select 1 / (select count(*) - 1 from notes) as n`
    const ask = () => db.transaction().execute(async () => db.remember(query.compile(db)))
    for (; attempt < 2; attempt++) await t.rejects(ask(), { code: '22012' })
    await add(db, 'two')
    t.strictSame(await ask(), [{ n: '1' }])
    await db.rollback()
    await t.rejects(Promise.all([db.remember(query.compile(db)), db.remember(query.compile(db))]), { code: '22012' })
    await db.rollback()
  })
})

test('a query that writes is no read', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (db) => {
    await t.rejects(db.remember(db.deleteFrom('notes').returningAll()), TypeError)
    t.equal(db.state, 'idle')
  })
})

test('who asks in a nested transaction does not wait for one who waits for it to end', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session(async (db) => {
    let outside: Promise<string[]> | undefined
    const outer = (fn: () => void) => new Promise<void>((resolve) => setImmediate(() => resolve(fn())))
    const asked = outer(() => {
      outside = texts(db)
    })
    const inside = await db.transaction().execute(async (trx) => {
      await add(trx, 'two')
      await asked
      return texts(db)
    })
    t.strictSame(inside, ['one', 'two'])
    t.strictSame(await outside, ['one', 'two'])
  })
})

test('in an autocommit session too', async (t) => {
  const app = await buildApp(t, database)
  await app.db.session({ autocommit: true }, async (db) => {
    t.strictSame(await texts(db), ['one'])
    await database.query("insert into notes (note) values ('elsewhere')")
    t.strictSame(await texts(db), ['one'])
    await db.transaction().execute((trx) => add(trx, 'two'))
    t.strictSame(await texts(db), ['one', 'elsewhere', 'two'])
  })
})

test('after the end of the session it is refused', async (t) => {
  const app = await buildApp(t, database)
  const db = await app.db.session(async (db) => {
    await texts(db)
    return db
  })
  await t.rejects(texts(db), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
})
