import { sql } from 'kysely'
import pg from 'pg'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// What a handler learns of a statement that PostgreSQL refused.

const database = await createDatabase(t, { sql: `${NOTES}; create unique index notes_once on notes (note)` })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()

t.beforeEach(() => database.query('truncate notes restart identity'))

test("the error is pg's own, with all that PostgreSQL said", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const error = await insert(db, 'a').catch((error: unknown) => error)
    t.ok(error instanceof pg.DatabaseError)
    t.match(error, {
      code: '23505',
      severity: 'ERROR',
      detail: 'Key (note)=(a) already exists.',
      constraint: 'notes_once',
      table: 'notes',
      schema: 'public',
      message: /duplicate key/,
    })
    throw error
  })
  t.match((await post()).json(), { statusCode: 500, code: '23505' })
})

test('an app error handler can map SQLSTATEs to answers', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      await insert(db, 'a')
    },
    {
      beside: (app) =>
        app.setErrorHandler((error: { code?: string }, _request, reply) => {
          reply.code(error.code === '23505' ? 409 : 500).send({ sqlState: error.code })
        }),
    },
  )
  const answer = await post()
  t.equal(answer.statusCode, 409)
  t.strictSame(answer.json(), { sqlState: '23505' })
  t.strictSame(await database.rows('notes'), [])
})

async function theRepository(db: Session): Promise<unknown> {
  return await db.selectFrom('notes').select(sql`1 / 0`.as('n')).execute()
}

const WAYS: [string, (db: Session) => Promise<unknown>][] = [
  ['a first statement', theRepository],
  [
    'a later statement',
    async (db) => {
      await insert(db, 'a')
      return await theRepository(db)
    },
  ],
  [
    'a statement in a nested transaction',
    async (db) => await db.transaction().execute(async () => await theRepository(db)),
  ],
]
for (const [what, way] of WAYS) {
  test(`the stack of ${what} that failed names the code that asked`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      const error = (await way(db).catch((error: unknown) => error)) as Error
      t.match(error.stack, /theRepository/)
      t.match(error.stack, /statement-errors\.ts/)
      t.match(error.stack, /^error: division by zero/)
      throw error
    })
    t.match((await post()).json(), { code: '22012' })
  })
}

test('the stack of a stream that failed names the code that asked', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    async function theExport() {
      for await (const row of db
        .selectFrom('notes')
        .select(sql`1 / id`.as('n'))
        .where('id', '=', sql<number>`1 / 0`)
        .stream(1))
        t.fail(row)
    }
    const error = (await theExport().catch((error: unknown) => error)) as Error
    t.match(error.stack, /theExport|statement-errors\.ts/)
    throw error
  })
  t.match((await post()).json(), { code: '22012' })
})

test('after an error every further statement is refused by the server, until rollback()', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await t.rejects(sql`select 1 / 0`.execute(db), { code: '22012' })
    t.equal(db.state, 'failed')
    await t.rejects(insert(db, 'b'), { code: '25P02' })
    await t.rejects(sql`select 1`.execute(db), { code: '25P02' })
    await db.rollback()
    await insert(db, 'c')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'c' }])
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`an error that the handler swallows never passes for a success (${commitOn})`, async (t) => {
    const { post, log, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'a')
        await sql`select 1 / 0`.execute(db).catch(() => {})
        return 'went on'
      },
      { commitOn, pool: { size: 1 } },
    )
    const answer = await post()
    t.match(answer.json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.strictSame(await database.rows('notes'), [])
    await post()
    const reported = log.lines.filter(({ err }) => err?.code === 'FST_REQUEST_DB_TRANSACTION_ABORTED')
    t.match(reported[0], { level: 50, reqId: 'req-1' })
    t.match(app.db.snapshot().totals, { opened: 1 })
  })
}

test('an error swallowed under an answer of 400 is a rollback like any other', async (t) => {
  const { post } = await oneRoute(t, database, async (db, _request, reply) => {
    await insert(db, 'a')
    await sql`select 1 / 0`.execute(db).catch(() => {})
    reply.code(422)
    return 'no'
  })
  const answer = await post()
  t.equal(answer.statusCode, 422)
  t.equal(answer.body, 'no')
})

test('statements side by side, one of them failing: the first error is the one to see', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await Promise.all([insert(db, 'b'), sql`select 1 / 0`.execute(db), insert(db, 'c'), insert(db, 'd')])
  })
  t.match((await post()).json(), { statusCode: 500, code: '22012' })
  t.strictSame(await database.rows('notes'), [])
})

test('an error under way when the handler returns does not pass for a success', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    sql`select 1 / 0`.execute(db).catch(() => {})
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await database.rows('notes'), [])
})

test("notices and warnings of the server are nobody's error", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await sql`do $$ begin raise warning 'careful'; raise notice 'by the way'; end $$`.execute(db)
    await sql`drop table if exists no_such_table`.execute(db)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})
