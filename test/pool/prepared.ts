import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
await database.query(`insert into notes (note) values ('one')`)
await database.query('create unique index on notes (note)')

async function setUp(t: Test, options: object = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(
    t,
    database,
    { connectionString: proxy.connectionString, pool: { size: 1 }, preparedStatements: { cacheSize: 10 }, ...options },
    (app) => {
      app.get('/read', ({ db }) => db.selectFrom('notes').select('note').where('note', '=', 'one').execute())
      app.get('/star', ({ db }) => sql`select * from shifting`.execute(db).then(({ rows }) => rows))
      app.post<{ Params: { note: string } }>('/notes/:note', async ({ db, params }) => {
        db.add(db.insertInto('notes').values({ note: params.note }))
        return 'kept'
      })
      app.get('/discard', ({ db }) => db.withClient(async (client) => void (await client.query('deallocate all'))))
      app.get('/raw', async ({ db }) => void (await sql`deallocate all`.execute(db)))
      app.get<{ Querystring: { ids: string } }>('/in', ({ db, query }) =>
        db.selectFrom('notes').select('id').where('id', 'in', query.ids.split(',').map(Number)).execute(),
      )
    },
  )
  const get = (url: string) => app.inject(url)
  const prepared = async () => {
    const names = 'select name, statement from pg_prepared_statements'
    return app.db.session((db) => db.withClient(async (client) => (await client.query(names)).rows))
  }
  return { app, proxy, get, prepared }
}

test('from its fourth use on a statement is parsed once, and BEGIN and COMMIT with it', async (t) => {
  const { proxy, get } = await setUp(t)
  for (let i = 0; i < 3; i++) t.equal((await get('/read')).statusCode, 200)
  proxy.clear()
  t.strictSame((await get('/read')).json(), [{ note: 'one' }])
  t.strictSame((await get('/read')).json(), [{ note: 'one' }])
  t.strictSame((await get('/read')).json(), [{ note: 'one' }])
  t.strictSame(
    proxy.flights.map(({ messages }) => messages),
    ['PBEHPBDES', 'PBES', 'BEHBES', 'BES', 'BEHBES', 'BES'],
  )
})

test('lists of ever-changing length do not push the others out', async (t) => {
  const { get, prepared } = await setUp(t)
  for (let i = 0; i < 5; i++) await get('/read')
  for (let i = 1; i < 60; i++) await get(`/in?ids=${Array.from({ length: i }, (_, k) => k).join(',')}`)
  await get('/read')
  await get('/read')
  t.ok((await prepared()).length <= 10)
  t.notOk((await prepared()).some(({ statement }) => statement.includes(' in (')))
})

test('a statement that fails loses its name, and works again under the same or another', async (t) => {
  const { get, app } = await setUp(t)
  const post = (note: string) => app.inject({ method: 'POST', url: `/notes/${note}` })
  for (let i = 0; i < 5; i++) t.equal((await post(`prepared ${i}`)).statusCode, 200)
  for (let i = 0; i < 3; i++) {
    t.match((await post('one')).json(), { code: '23505' })
    t.equal((await post(`again ${i}`)).statusCode, 200)
    t.strictSame((await get('/read')).json(), [{ note: 'one' }])
  }
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('cached plan must not change result type: retryable, and the next one is right, on every connection', async (t) => {
  await database.query('create table shifting (a int); insert into shifting values (1)')
  const { get, app } = await setUp(t, { pool: { size: 2 } })
  const both = () => Promise.all([get('/star'), get('/star')])
  for (let i = 0; i < 5; i++) await both()
  await database.query('alter table shifting add column b int default 2')
  const changed = await get('/star')
  t.match(changed.json(), { statusCode: 503, code: '0A000' })
  for (const answer of [...(await both()), ...(await both())]) t.strictSame(answer.json(), [{ a: 1, b: 2 }])
  t.equal(app.db.snapshot().totals.invalidated, 0)
})

test('the error of a stale plan says that it can be tried again', async (t) => {
  await database.query('create table shifty (a int)')
  const { app } = await setUp(t)
  const read = () => app.db.session((db) => sql`select * from shifty`.execute(db))
  for (let i = 0; i < 5; i++) await read()
  await database.query('alter table shifty add column b int')
  await t.rejects(read(), { code: '0A000', retryable: true })
  await t.resolves(read())
})

for (const url of ['/discard', '/raw']) {
  test(`names that the app has ended behind our back are not used again (${url})`, async (t) => {
    const { get, app } = await setUp(t)
    for (let i = 0; i < 6; i++) await get('/read')
    t.equal((await get(url)).statusCode, 200)
    for (let i = 0; i < 3; i++) t.strictSame((await get('/read')).json(), [{ note: 'one' }])
    t.equal(app.db.snapshot().totals.opened, 1)
  })
}

test('under load, with failures among them, every answer is right', async (t) => {
  const { app, get } = await setUp(t, { pool: { size: 3 }, preparedStatements: { cacheSize: 3 } })
  const lengths = Array.from({ length: 8 }, (_, i) => Array.from({ length: i + 1 }, (_, k) => k + 1).join(','))
  const answers = await Promise.all(
    Array.from({ length: 400 }, async (_, i) => {
      if (i % 5 === 0) return (await app.inject({ method: 'POST', url: '/notes/one' })).json().code === '23505'
      if (i % 2 === 0) return (await get(`/in?ids=${lengths[i % 8]}`)).statusCode === 200
      return (await get('/read')).body === '[{"note":"one"}]'
    }),
  )
  t.ok(answers.every((isRight) => isRight))
  t.equal(app.db.snapshot().totals.opened, 3)
})
