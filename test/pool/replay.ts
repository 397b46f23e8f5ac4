import { sql } from 'kysely'
import type { RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { add, notesIn, verbs } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }

/** An app with one idle connection through a proxy, and no ping that would find out that it is dead. */
async function setUp(t: Test, options: RequestDbOptions = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const pool = { size: 2, prePing: false as const, ...options.pool }
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, ...options, pool }, (app) => {
    app.get('/', async ({ db }) => sql`select 1`.execute(db))
    app.post('/', async ({ db }) => {
      await add(db, 'kept')
      return 'ok'
    })
    app.post('/parallel', async ({ db }) => {
      await Promise.all(['a', 'b', 'c', 'd', 'e'].map((note) => add(db, note)))
      return 'ok'
    })
    app.post('/autocommit', { config: { db: { autocommit: true } } }, ({ db }) => add(db, 'kept?'))
  })
  await app.inject('/')
  await eventually(() => app.db.snapshot().idle === 1)
  proxy.clear()
  return { proxy, app }
}
const post = { method: 'POST', url: '/' } as const

for (const commitOn of ['onSend', 'onResponse'] as const) {
  for (const how of ['end', 'reset'] as const) {
    test(`${commitOn}: BEGIN that meets a connection closed by ${how} is sent once more on a fresh one`, async (t) => {
      const { proxy, app } = await setUp(t, { commitOn })
      proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, how)
      t.equal((await app.inject(post)).statusCode, 200)
      await eventually(() => app.db.snapshot().checkedOut === 0)
      t.strictSame(await notesIn(database), ['kept'])
      t.strictSame(verbs(proxy), [['BEGIN', 'INSERT'], ['BEGIN', 'INSERT'], ['COMMIT']])
      t.strictSame(
        proxy.flights.map(({ connection }) => connection),
        [1, 2, 2],
      )
      t.match(app.db.snapshot(), { open: 1, totals: { replays: 1, opened: 2, invalidated: 1, commits: 2 } })
    })
  }

  test(`${commitOn}: also where BEGIN's answer was on its way: what it began is rolled back by the server`, async (t) => {
    const { proxy, app } = await setUp(t, { commitOn })
    proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'reset')
    t.equal((await app.inject(post)).statusCode, 200)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.equal((await notesIn(database)).length, 1, 'kept once')
    t.match(app.db.snapshot().totals, { replays: 1, opened: 2 })
  })
}

test('a FATAL that waits where the answer to BEGIN should be is a replay too', async (t) => {
  const { proxy, app } = await setUp(t)
  const goodbye = proxy.trap({ from: 'server', type: 'E', text: '57P01' }, 'hold')
  const [backend] = await database.backends()
  await database.query('select pg_terminate_backend($1, 5000)', [backend!.pid])
  await goodbye.sprung
  const answer = app.inject(post)
  await eventually(() => proxy.flights.length === 1)
  goodbye.release()
  t.equal((await answer).statusCode, 200)
  t.strictSame(await notesIn(database), ['kept'])
  t.match(app.db.snapshot().totals, { replays: 1, opened: 2 })
})

test('never twice', async (t) => {
  const { proxy, app } = await setUp(t)
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset', { times: 2 })
  t.match((await app.inject(post)).json(), LOST)
  t.strictSame(await notesIn(database), [])
  t.equal(proxy.flights.length, 2)
  t.match(app.db.snapshot(), { open: 0, totals: { replays: 1, opened: 2 } })
  t.equal((await app.inject(post)).statusCode, 200)
})

test('never on a connection that is silent: the attempt may hold the very locks the replay waits for', async (t) => {
  const { proxy, app } = await setUp(t, { settleTimeoutMillis: 200 })
  const trap = proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'swallow')
  const client = (await openHttp(t, app)).send('POST', '/')
  await trap.sprung
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.equal(proxy.flights.length, 1)
  t.match(app.db.snapshot(), { open: 0, totals: { replays: 0, opened: 1 } })
  t.strictSame(await notesIn(database), [])
})

test('not when maxSessionMillis ends the silence either', async (t) => {
  const { proxy, app } = await setUp(t, { settleTimeoutMillis: 200, maxSessionMillis: 300 })
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'swallow')
  t.ok((await app.inject(post)).statusCode >= 500)
  t.equal(proxy.flights.length, 1)
  t.match(app.db.snapshot(), { checkedOut: 0, totals: { replays: 0 } })
})

test('never after BEGIN was answered', async (t) => {
  const { proxy, app } = await setUp(t)
  const lock = await database.client()
  await lock.query('begin; lock table notes in exclusive mode')
  proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'reset', { place: 'after' })
  const answer = app.inject(post)
  t.match((await answer).json(), LOST)
  await lock.query('rollback')
  t.equal(proxy.flights.length, 1)
  t.match(app.db.snapshot().totals, { replays: 0 })
  await eventually(async () => (await database.backends()).length === 0)
  t.strictSame(await notesIn(database), [])
})

test('never a later statement, of whichever transaction of the request', async (t) => {
  const { proxy, app } = await setUp(t)
  app.log.level = 'silent'
  proxy.trap({ from: 'client', type: 'P', text: 'delete' }, 'reset')
  await t.rejects(
    app.db.session(async (db) => {
      await add(db, 'committed')
      await db.commit()
      await add(db, 'lost')
      await db.deleteFrom('notes').execute()
    }),
    { code: LOST.code },
  )
  t.strictSame(await notesIn(database), ['committed'])
  t.match(app.db.snapshot().totals, { replays: 0 })
})

test('the first flight of a later transaction of the session is one too', async (t) => {
  const { proxy, app } = await setUp(t)
  await app.db.session(async (db) => {
    await add(db, 'first')
    await db.commit()
    proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
    await add(db, 'second')
  })
  t.strictSame(await notesIn(database), ['first', 'second'])
  t.match(app.db.snapshot().totals, { replays: 1 })
})

test('never an autocommit statement: it may have been run', async (t) => {
  const { proxy, app } = await setUp(t)
  proxy.trap({ from: 'server', type: 'C', text: 'INSERT' }, 'reset')
  const answer = await app.inject({ method: 'POST', url: '/autocommit' })
  t.ok(answer.statusCode >= 500)
  t.equal((await notesIn(database)).length, 1, 'it was run, once')
  t.match(app.db.snapshot().totals, { replays: 0 })
  t.notMatch(answer.json(), { code: LOST.code }, 'so nobody may say that all is rolled back, try again')
  t.match(answer.json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
})

test('an autocommit statement that never reached the server is not sent again either', async (t) => {
  const { proxy, app } = await setUp(t)
  proxy.trap({ from: 'client', type: 'P', text: 'insert' }, 'reset')
  t.ok((await app.inject({ method: 'POST', url: '/autocommit' })).statusCode >= 500)
  t.strictSame(await notesIn(database), [])
  t.match(app.db.snapshot().totals, { replays: 0 })
})

test('a statement of fastify.db.kysely whose answer is lost is not reported as rolled back', async (t) => {
  const { proxy, app } = await setUp(t)
  proxy.trap({ from: 'server', type: 'C', text: 'INSERT' }, 'reset')
  await t.rejects(app.db.kysely.insertInto('notes').values({ note: 'kept' }).execute(), {
    code: 'FST_REQUEST_DB_COMMIT_UNKNOWN',
    retryable: false,
  })
  t.equal((await notesIn(database)).length, 1)
})

test('parallel first statements are replayed together and in their order', async (t) => {
  const { proxy, app } = await setUp(t)
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  t.equal((await app.inject({ method: 'POST', url: '/parallel' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['a', 'b', 'c', 'd', 'e'])
  t.strictSame(proxy.statements()[0], proxy.statements()[1])
  t.match(app.db.snapshot().totals, { replays: 1 })
})

test('settings and values are sent again as they were', async (t) => {
  let asked = 0
  const { proxy, app } = await setUp(t, { settings: () => ({ 'app.tenant': `t${++asked}` }) })
  app.log.level = 'silent'
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  const before = asked
  t.equal((await app.inject(post)).statusCode, 200)
  t.strictSame(verbs(proxy), [['BEGIN', 'SELECT', 'INSERT'], ['BEGIN', 'SELECT', 'INSERT'], ['COMMIT']])
  t.equal(asked, before + 1, 'settings are asked once a transaction')
})

test('begin() by hand, a stream and withClient() survive a dead connection too', async (t) => {
  const { proxy, app } = await setUp(t)
  const meetDeath = () => proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  meetDeath()
  await app.db.session(async (db) => {
    await db.begin()
    await add(db, 'begun')
  })
  meetDeath()
  await app.db.session(async (db) => {
    const streamed: unknown[] = []
    for await (const row of db.selectFrom('notes').select('note').stream(1)) streamed.push(row)
    t.match(streamed, [{ note: 'begun' }])
  })
  meetDeath()
  await app.db.session((db) => db.withClient((client) => client.query("insert into notes (note) values ('by hand')")))
  meetDeath()
  await app.db.session((db) =>
    db.transaction().execute((trx) => trx.insertInto('notes').values({ note: 'nested' }).execute()),
  )
  t.strictSame(await notesIn(database), ['begun', 'by hand', 'nested'])
  t.match(app.db.snapshot().totals, { replays: 4, commits: 5 })
})

test('where no fresh connection can be had, that is the answer', async (t) => {
  const { proxy, app } = await setUp(t)
  await proxy.refuse()
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset')
  t.match((await app.inject(post)).json(), { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' })
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0 })
  await proxy.accept()
  t.equal((await app.inject(post)).statusCode, 200)
})

test('a replay on a full pool waits its turn, and all are served', async (t) => {
  const { proxy, app } = await setUp(t, { pool: { size: 1 } })
  const trap = proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'hold')
  const first = app.inject(post)
  await trap.sprung
  const others = Array.from({ length: 5 }, () => app.inject(post))
  await eventually(() => app.db.snapshot().waiting === 5)
  proxy.cut('reset')
  for (const one of [first, ...others]) t.equal((await one).statusCode, 200)
  t.equal((await notesIn(database)).length, 6)
  t.match(app.db.snapshot(), { open: 1, totals: { replays: 1, opened: 2 } })
})

test('a client that left meanwhile is not served again', async (t) => {
  const { proxy, app } = await setUp(t)
  const trap = proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'hold')
  const gone = gate()
  app.server.on('connection', (socket) => socket.once('close', () => gone.open()))
  const client = (await openHttp(t, app)).send('POST', '/')
  await trap.sprung
  client.destroy()
  await gone.opened
  proxy.cut('reset')
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.match(app.db.snapshot(), { open: 0, totals: { replays: 0, opened: 1 } })
  t.strictSame(await notesIn(database), [])
})
