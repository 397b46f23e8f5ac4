import type { FastifyRequest } from 'fastify'
import { type Compilable, type CompiledQuery, sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

// What goes wrong in one statement stays in it: the answer is an error, nothing is kept, and the connection is as good as before.
const database = await createDatabase(t, {
  sql: `${NOTES};
    create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(30); return null; end $$;
    create table slow_to_commit (id int);
    create constraint trigger slow after insert on slow_to_commit deferrable initially deferred
      for each row execute function slow()`,
})
t.afterEach(async () => void (await database.query('delete from notes')))

type Handler = (request: FastifyRequest) => Promise<unknown>

/** An app of one connection: POST / does what is bad, GET / tells the backend. */
async function setUp(t: Test, options: object, handler: Handler) {
  return await buildApp(t, database, { pool: { size: 1 }, ...options }, (app) => {
    app.post('/', handler)
    app.get('/', ({ db }) => pidOf(db))
  })
}
const throwing = {
  toPostgres: () => {
    throw new Error('cannot be mapped')
  },
}
const circular: { self?: object } = {}
circular.self = circular

const many = Array.from({ length: 65_536 + 3 }, (_, i) => ({ note: String(i) }))
const note = (db: Session, note: string) => db.insertInto('notes').values({ note })
const raw = (text: string) => (db: Session) => sql.raw(text).compile(db)

const BAD: Record<string, { query: (db: Session) => CompiledQuery; answer: object }> = {
  'a NUL character in a value': { query: (db) => note(db, 'a\0b').compile(), answer: { code: '22021' } },
  'a NUL character in the SQL': { query: raw("select 'a\0b'"), answer: {} },
  'a value of the wrong type': { query: (db) => sql`select ${'x'}::uuid`.compile(db), answer: { code: '22P02' } },
  'a value whose mapping throws': {
    query: (db) => sql`select ${throwing}`.compile(db),
    answer: { message: 'cannot be mapped' },
  },
  'a value that holds itself': { query: (db) => sql`select ${circular}::json`.compile(db), answer: {} },
  'a symbol for a value': { query: (db) => sql`select ${Symbol('s')}::text, 1/0`.compile(db), answer: {} },
  'more values than the protocol can count': {
    query: (db) => db.insertInto('notes').values(many).compile(),
    answer: {},
  },
  'a syntax error': { query: raw('selec 1'), answer: { code: '42601' } },
  'two statements in one': { query: raw('select 1; select 2'), answer: { code: '42601' } },
  'a table that is not there': { query: raw('select * from nowhere'), answer: { code: '42P01' } },
  'a value too few': { query: raw('select $1::int'), answer: { code: '08P01' } },
  'an exception of a function': {
    query: raw("do $$ begin raise exception 'mine' using errcode = 'P4711'; end $$"),
    answer: { code: 'P4711' },
  },
}

for (const [title, { query, answer }] of Object.entries(BAD)) {
  test(`${title}: an error, nothing kept, the connection used again`, async (t) => {
    const app = await setUp(t, {}, async ({ db }) => {
      await add(db, 'lost')
      await db.executeQuery(query(db))
    })
    const pid = (await app.inject('/')).body
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, ...answer })
    t.strictSame(await notesIn(database), [])
    t.equal((await app.inject('/')).body, pid)
    t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0 })
  })

  test(`${title} as the first statement: an error, and the connection used again`, async (t) => {
    const app = await setUp(t, {}, async ({ db }) => {
      await db.executeQuery(query(db))
    })
    const pid = (await app.inject('/')).body
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, ...answer })
    t.strictSame(await notesIn(database), [])
    t.equal((await app.inject('/')).body, pid)
  })

  test(`${title}, added for later: an error, and nothing kept`, async (t) => {
    const app = await setUp(t, {}, async ({ db }) => {
      await add(db, 'lost')
      const compiled = query(db)
      db.add({ compile: () => compiled } as Compilable)
    })
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
    t.strictSame(await notesIn(database), [])
    t.equal((await app.inject('/')).statusCode, 200)
    t.match(app.db.snapshot().totals, { opened: 1 })
  })
}

test('a statement that fails in the settings is the error of the first statement, and the connection is used again', async (t) => {
  let name = 'app.tenant'
  const app = await setUp(t, { settings: () => ({ [name]: 'x' }) }, async ({ db }) => {
    await add(db, 'lost')
  })
  const pid = (await app.inject('/')).body
  name = 'no such setting'
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, code: '42704' })
  name = 'app.tenant'
  t.equal((await app.inject('/')).body, pid)
  t.strictSame(await notesIn(database), [])
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`${commitOn}: a statement that takes longer than statementTimeoutMillis is 57014, and the connection is used again`, async (t) => {
    const app = await setUp(t, { commitOn, statementTimeoutMillis: 100 }, async ({ db }) => {
      await add(db, 'lost')
      await sql`select pg_sleep(30)`.execute(db)
    })
    const pid = (await app.inject('/')).body
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, code: '57014' })
    t.strictSame(await notesIn(database), [])
    t.equal((await app.inject('/')).body, pid)
  })
}

test('a statement that is cancelled by an administrator is 57014, and the connection is used again', async (t) => {
  const app = await setUp(t, {}, async ({ db }) => {
    await add(db, 'lost')
    await sql`select pg_sleep(30)`.execute(db)
  })
  const pid = Number((await app.inject('/')).body)
  const answer = app.inject({ method: 'POST', url: '/' })
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep')))
  await database.query('select pg_cancel_backend($1)', [pid])
  t.match((await answer).json(), { statusCode: 500, code: '57014' })
  t.strictSame(await notesIn(database), [])
  t.equal(Number((await app.inject('/')).body), pid)
})

test('a COMMIT that is cancelled by an administrator is 57014, keeps nothing, and the connection is used again', async (t) => {
  const app = await setUp(t, { settleTimeoutMillis: 20_000 }, async ({ db }) => {
    await add(db, 'lost')
    await sql`insert into slow_to_commit values (1)`.execute(db)
  })
  const pid = Number((await app.inject('/')).body)
  const answer = app.inject({ method: 'POST', url: '/' })
  await eventually(async () =>
    (await database.backends()).some(({ query, waitEvent }) => query === 'COMMIT' && waitEvent === 'PgSleep'),
  )
  await database.query('select pg_cancel_backend($1)', [pid])
  t.match((await answer).json(), { statusCode: 500, code: '57014', message: /^COMMIT failed with 57014/ })
  t.strictSame(await notesIn(database), [])
  t.equal(Number((await app.inject('/')).body), pid)
})

test('a type parser that throws is an error of the handler, and the rest is rolled back', async (t) => {
  const connection = {
    connectionString: database.connectionString,
    types: {
      getTypeParser: () => (text: string) => {
        if (text === 'unreadable') throw new Error('cannot be read')
        return text
      },
    } as never,
  }
  const app = await setUp(t, { connection }, async ({ db }) => {
    await db.insertInto('notes').values({ note: 'unreadable' }).returning('note').execute()
  })
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, message: 'cannot be read' })
  t.strictSame(await notesIn(database), [])
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(app.db.snapshot().totals, { opened: 1 })
})

test('notices and notifications are no trouble', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await setUp(t, { connectionString: proxy.connectionString }, async ({ db }) => {
    await sql.raw("do $$ begin for i in 1..50 loop raise warning 'careful'; end loop; end $$").execute(db)
    await sql.raw('listen news').execute(db)
    await sql.raw("notify news, 'now'").execute(db)
    await add(db, 'kept')
  })
  for (let i = 0; i < 3; i++) t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['kept', 'kept', 'kept'])
  t.match(app.db.snapshot().totals, { opened: 1 })
})
