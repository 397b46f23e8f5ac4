import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

test('the next session’s first flight leaves behind COMMIT, before that is answered', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/:id', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  await app.inject('/warm')
  proxy.clear()
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const answers = ['/1', '/2', '/3'].map((url) => app.inject(url))
  await held.sprung
  await eventually(() => proxy.statements().length === 3)
  t.match(proxy.statements(), [['BEGIN', /select/], ['COMMIT'], ['BEGIN', /select/]], 'one behind, not two')
  t.match(app.db.snapshot(), { checkedOut: 1, waiting: 1, totals: { handOvers: 1 } })
  held.release()
  for (const answer of await Promise.all(answers)) t.equal(answer.statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, totals: { handOvers: 2, opened: 1 } })
})

test('who comes while COMMIT is unanswered follows it where every connection is taken', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = app.inject('/')
  await held.sprung
  const second = app.inject('/')
  await eventually(() => app.db.snapshot().totals.handOvers === 1)
  held.release()
  t.equal((await first).statusCode, 200)
  t.equal((await second).statusCode, 200)
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('sessions that only add follow each other at once, and a failing one is its own error alone', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
      db.add(db.insertInto('notes').values({ note: (params.note === 'bad' ? null : params.note) as string }))
      return 'kept'
    })
  })
  const notes = ['a', 'b', 'bad', 'c', 'd', 'bad', 'e']
  const answers = await Promise.all(notes.map((note) => app.inject({ method: 'POST', url: `/${note}` })))
  t.strictSame(
    answers.map(({ statusCode }) => statusCode),
    [200, 200, 500, 200, 200, 500, 200],
  )
  t.match(answers[2]?.json(), { code: '23502' })
  const rows = await database.rows('notes')
  t.strictSame(
    rows.map(({ note }) => note),
    ['a', 'b', 'c', 'd', 'e'],
  )
  t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0, commits: 5, failedCommits: 2 })
})

test('a COMMIT that fails is the error of its own session', async (t) => {
  await database.query(`create table strict_notes (id int primary key, twin int references strict_notes
    deferrable initially deferred)`)
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post<{ Params: { id: string; twin: string } }>('/:id/:twin', async ({ db, params }) => {
      const rows = { id: Number(params.id), twin: Number(params.twin) }
      await db
        .withTables<{ strict_notes: { id: number; twin: number } }>()
        .insertInto('strict_notes')
        .values(rows)
        .execute()
      return 'kept'
    })
  })
  const answers = await Promise.all(
    ['/1/1', '/2/99', '/3/3', '/4/98', '/5/5'].map((url) => app.inject({ method: 'POST', url })),
  )
  t.strictSame(
    answers.map(({ statusCode }) => statusCode),
    [200, 500, 200, 500, 200],
  )
  t.match(answers[1]?.json(), { code: '23503' })
  t.strictSame(
    (await database.rows('strict_notes')).map(({ id }) => id),
    [1, 3, 5],
  )
  t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0, handOvers: 4 })
})

for (const how of ['end', 'reset'] as const) {
  test(`the connection dies (${how}) at COMMIT: its session is told, the one behind is replayed elsewhere`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
    const inserted = gate()
    const goOn = gate()
    const app = await buildApp(t, database, options, (app) => {
      app.post('/first', async ({ db }) => {
        await db
          .insertInto('notes')
          .values({ note: `first ${how}` })
          .execute()
        inserted.open()
        await goOn.opened
      })
      app.post('/second', async ({ db }) => {
        await db
          .insertInto('notes')
          .values({ note: `second ${how}` })
          .execute()
        return 'kept'
      })
    })
    proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, how)
    const first = app.inject({ method: 'POST', url: '/first' })
    await inserted.opened
    const second = app.inject({ method: 'POST', url: '/second' })
    await eventually(() => app.db.snapshot().waiting === 1)
    goOn.open()
    t.match((await first).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
    t.equal((await second).statusCode, 200)
    t.match(app.db.snapshot().totals, { replays: 1, handOvers: 1 })
    const notes = (await database.rows('notes')).map(({ note }) => note)
    t.ok(notes.includes(`second ${how}`))
    t.notOk(notes.includes(`first ${how}`))
  })
}

test('the wait behind an unanswered COMMIT counts against pool.timeoutMillis', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1, timeoutMillis: 200 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
      await db.insertInto('notes').values({ note: params.note }).execute()
      return 'kept'
    })
  })
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = app.inject({ method: 'POST', url: '/patient' })
  await held.sprung
  const since = performance.now()
  const second = await app.inject({ method: 'POST', url: '/overdue' })
  t.match(second.json(), { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
  t.ok(second.headers['retry-after'])
  t.ok(performance.now() - since >= 199)
  t.equal(app.db.snapshot().totals.timeouts, 1)
  held.release()
  t.equal((await first).statusCode, 200)
  await eventually(() => app.db.snapshot().idle === 1)
  const notes = (await database.rows('notes')).map(({ note }) => note)
  t.ok(notes.includes('patient'))
  t.notOk(notes.includes('overdue'))
  t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0 })
})

test('who has cancelled hands nothing over before ROLLBACK is answered', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/slow', ({ db }) =>
      db
        .withClient((client) => client.query('select 1'))
        .then(async () => {
          void db
            .selectNoFrom((eb) => eb.fn('pg_sleep', [eb.lit(60)]).as('slept'))
            .execute()
            .catch(() => {})
          await eventually(() => app.db.snapshot().holders[0]?.lastStatement?.includes('pg_sleep') === true)
          throw new Error('mine')
        }),
    )
    app.get('/next', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  const held = proxy.trap({ from: 'server', type: 'C', text: 'ROLLBACK' }, 'hold')
  const slow = app.inject('/slow')
  await eventually(() => app.db.snapshot().checkedOut === 1)
  const next = app.inject('/next')
  await held.sprung
  t.match(app.db.snapshot(), { waiting: 1, totals: { handOvers: 0, cancels: 1 } })
  held.release()
  t.equal((await slow).statusCode, 500)
  t.equal((await next).statusCode, 200)
})
