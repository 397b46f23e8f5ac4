import { setImmediate as turn } from 'node:timers/promises'
import { sql } from 'kysely'
import type { RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, verbs } from '../support/notebook.ts'
import { type PostgresProxy, startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const UNKNOWN = { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' }
const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }

/** POST / writes one row, POST /added only adds one; what callbacks were called is in `called`. */
async function setUp(t: Test, options: RequestDbOptions = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const called: string[] = []
  const log: string[] = []
  const app = await buildApp(
    t,
    database,
    { connectionString: proxy.connectionString, ...options },
    (app) => {
      app.post('/', async ({ db }, reply) => {
        db.afterCommit(() => called.push('afterCommit'))
        db.afterRollback(() => called.push('afterRollback'))
        await add(db, 'kept?')
        reply.code(201).header('location', '/1').header('etag', '"1"').header('cache-control', 'max-age=60')
        return 'created'
      })
      app.post('/added', async ({ db }) => {
        db.add(db.insertInto('notes').values({ note: 'kept?' }))
        return 'added'
      })
      app.get('/', ({ db }) => db.selectFrom('notes').selectAll().execute())
    },
    { logger: { level: 'error', stream: { write: (line: string) => log.push(line) } } },
  )
  return { proxy, app, called, log }
}

/** A COMMIT that gets lost, and whether the server had run it. */
const LOSSES: { title: string; set: (proxy: PostgresProxy) => unknown; kept: boolean }[] = [
  {
    title: 'is cut off on its way',
    set: (proxy) => proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset'),
    kept: false,
  },
  {
    title: 'meets a socket that closes in good order',
    set: (proxy) => proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'end'),
    kept: false,
  },
  {
    title: 'is run and its answer cut off',
    set: (proxy) => proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'end'),
    kept: true,
  },
  {
    title: 'is run and its answer reset',
    set: (proxy) => proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'reset'),
    kept: true,
  },
  {
    title: 'falls into a hole',
    set: (proxy) => proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow'),
    kept: false,
  },
  {
    title: 'is run and its answer falls into a hole',
    set: (proxy) => proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'swallow'),
    kept: true,
  },
]

for (const { title, set, kept } of LOSSES) {
  test(`onSend: a COMMIT that ${title} is COMMIT_UNKNOWN`, async (t) => {
    const { proxy, app, called } = await setUp(t, { settleTimeoutMillis: 300 })
    await app.inject('/')
    const { commits } = app.db.snapshot().totals
    proxy.clear()
    set(proxy)
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.match(answer.json(), UNKNOWN)
    t.notMatch(answer.headers, { location: String }, 'nothing of the 201 is left')
    t.notOk(answer.headers.etag ?? answer.headers['cache-control'])
    t.equal((await notesIn(database)).length, kept ? 1 : 0)
    t.strictSame(verbs(proxy), [['BEGIN', 'INSERT'], ['COMMIT']], 'COMMIT is sent once, and no ROLLBACK')
    t.match(app.db.snapshot(), { open: 0, totals: { commits, failedCommits: 1, invalidated: 1, replays: 0 } })
    t.strictSame(called, [], 'neither outcome is certain')
    await eventually(() => proxy.sessions[0]?.closed === true)
    t.equal((await app.inject('/')).statusCode, 200)
  })

  test(`onResponse: a COMMIT that ${title} is logged with the request's id`, async (t) => {
    const { proxy, app, called, log } = await setUp(t, { settleTimeoutMillis: 300, commitOn: 'onResponse' })
    set(proxy)
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.equal(answer.statusCode, 201, 'it had left before the commit')
    await eventually(() => log.length > 0)
    t.match(JSON.parse(log[0]!), { reqId: /./, err: { code: UNKNOWN.code } })
    t.equal(log.length, 1)
    t.equal((await notesIn(database)).length, kept ? 1 : 0)
    t.match(app.db.snapshot(), { open: 0, totals: { commits: 0, failedCommits: 1 } })
    t.strictSame(called, [], 'neither outcome is certain')
  })

  test(`a deferred write whose COMMIT ${title} is COMMIT_UNKNOWN and not sent again`, async (t) => {
    const { proxy, app } = await setUp(t, { settleTimeoutMillis: 300 })
    await app.inject('/')
    proxy.clear()
    set(proxy)
    t.match((await app.inject({ method: 'POST', url: '/added' })).json(), UNKNOWN)
    t.equal((await notesIn(database)).length, kept ? 1 : 0)
    t.equal(proxy.flights.length, 1)
    t.match(app.db.snapshot(), { open: 0, totals: { replays: 0, failedCommits: 1 } })
  })
}

test('a flight with COMMIT in it that is reset before BEGIN is answered is not sent again', async (t) => {
  const { proxy, app } = await setUp(t)
  await app.inject('/')
  proxy.clear()
  proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'reset')
  t.match((await app.inject({ method: 'POST', url: '/added' })).json(), UNKNOWN)
  t.strictSame(verbs(proxy), [['BEGIN', 'INSERT', 'COMMIT']])
  t.equal((await notesIn(database)).length, 1, 'the server had run all of it')
  t.match(app.db.snapshot().totals, { replays: 0 })
})

test('COMMIT unanswered is given up after settleTimeoutMillis, not earlier', async (t) => {
  const { proxy, app } = await setUp(t, { settleTimeoutMillis: 400 })
  await app.inject('/')
  let sentAt = 0
  const trap = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  void trap.sprung.then(() => {
    sentAt = performance.now()
  })
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), UNKNOWN)
  const waited = performance.now() - sentAt
  t.ok(waited > 380 && waited < 1400, `after ${waited} ms`)
})

test('a COMMIT that is answered late, but in time, is a commit', async (t) => {
  const { proxy, app } = await setUp(t, { settleTimeoutMillis: 2000 })
  await app.inject('/')
  proxy.delay(150)
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 201)
  t.equal((await notesIn(database)).length, 1)
})

test('an app that computes longer than settleTimeoutMillis does not make a live server look dead', async (t) => {
  const app = await buildApp(t, database, { settleTimeoutMillis: 50 }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'kept')
      const committed = db.commit()
      await turn()
      for (const until = performance.now() + 200; performance.now() < until; );
      await committed
      return 'ok'
    })
  })
  for (let i = 0; i < 5; i++) t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.equal((await notesIn(database)).length, 5)
  t.match(app.db.snapshot().totals, { opened: 1, failedCommits: 0 })
})

test('a backend killed while a deferred write runs, COMMIT behind it in the flight, is CONNECTION_LOST', async (t) => {
  const { app } = await setUp(t, { settleTimeoutMillis: 5000 })
  const lock = await database.client()
  await lock.query('begin; lock table notes in exclusive mode')
  const answer = app.inject({ method: 'POST', url: '/added' })
  let pid = 0
  await eventually(async () => {
    const blocked = (await database.backends()).find(({ waitEvent }) => waitEvent === 'relation')
    pid = blocked?.pid ?? 0
    return pid !== 0
  })
  await database.query('select pg_terminate_backend($1, 5000)', [pid])
  t.match((await answer).json(), LOST, 'the server said goodbye before COMMIT had its turn')
  await lock.query('rollback')
  t.strictSame(await notesIn(database), [])
  t.match(app.db.snapshot(), { open: 0, totals: { replays: 0 } })
})

test('a goodbye of the server that comes while COMMIT is on its way is COMMIT_UNKNOWN', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const goodbye = proxy.trap({ from: 'server', type: 'E', text: '57P01' }, 'hold')
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'lost')
      const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
      await database.query('select pg_terminate_backend($1, 5000)', [rows[0]!.pid])
      await goodbye.sprung
      return 'ok'
    })
  })
  const answer = app.inject({ method: 'POST', url: '/' })
  await eventually(() => proxy.statements().flat().includes('COMMIT'))
  goodbye.release()
  t.match((await answer).json(), UNKNOWN)
  t.strictSame(await notesIn(database), [])
})

test('a commit() by hand that is lost throws COMMIT_UNKNOWN into the handler, and the session can go on', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'end')
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'first')
      await t.rejects(db.commit(), { code: UNKNOWN.code, retryable: false })
      const found = await db.selectFrom('notes').select('note').execute()
      if (found.length === 0) await add(db, 'again')
      return found
    })
  })
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), [{ note: 'first' }])
  t.equal((await notesIn(database)).length, 1)
})

test('who is behind a COMMIT that is never answered is rolled back and told so, but not replayed: its first try may hold locks', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const inserted = gate()
  const goOn = gate()
  const options = { connectionString: proxy.connectionString, pool: { size: 1 }, settleTimeoutMillis: 200 }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/first', async ({ db }) => {
      await add(db, 'first')
      inserted.open()
      await goOn.opened
    })
    app.post('/second', async ({ db }) => {
      await add(db, 'second')
    })
  })
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  const first = app.inject({ method: 'POST', url: '/first' })
  await inserted.opened
  const second = app.inject({ method: 'POST', url: '/second' })
  await eventually(() => app.db.snapshot().waiting === 1)
  goOn.open()
  t.match((await first).json(), UNKNOWN)
  t.match((await second).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.match(app.db.snapshot().totals, { handOvers: 1, replays: 0 })
  t.strictSame(await notesIn(database), [])
  t.equal((await app.inject({ method: 'POST', url: '/second' })).statusCode, 200, 'who comes next is unharmed')
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`${commitOn}: a ROLLBACK that falls into a hole is given up, and the error that led to it is the answer`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { commitOn, connectionString: proxy.connectionString, settleTimeoutMillis: 300 }
    const app = await buildApp(t, database, options, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        throw new Error('mine')
      })
    })
    proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'swallow')
    const since = performance.now()
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, message: 'mine' })
    t.ok(performance.now() - since < 2000)
    t.strictSame(await notesIn(database), [])
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(app.db.snapshot(), { open: 0, totals: { rollbacks: 1, invalidated: 1 } })
    await eventually(() => proxy.sessions[0]?.closed === true)
  })

  test(`${commitOn}: where the hole opens before the handler returns or throws, the answer still comes in time`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { commitOn, connectionString: proxy.connectionString, settleTimeoutMillis: 300 }
    const app = await buildApp(t, database, options, (app) => {
      app.post('/:end', async ({ db, params }) => {
        await add(db, 'lost')
        proxy.swallow()
        if ((params as { end: string }).end === 'throw') throw new Error('mine')
        return 'ok'
      })
    })
    const since = performance.now()
    const returned = await app.inject({ method: 'POST', url: '/return' })
    if (commitOn === 'onSend') t.match(returned.json(), UNKNOWN)
    else t.equal(returned.statusCode, 200)
    t.match((await app.inject({ method: 'POST', url: '/throw' })).json(), { message: 'mine' })
    await eventually(() => app.db.snapshot().open === 0)
    t.ok(performance.now() - since < 3000)
    t.strictSame(await notesIn(database), [])
  })
}

test('a read-only session is not held up by a COMMIT that falls into a hole, and the connection is not used again', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = {
    connectionString: proxy.connectionString,
    pool: { size: 1 },
    settleTimeoutMillis: 300,
    readOnly: true,
  }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  t.equal((await app.inject('/')).statusCode, 200)
  await eventually(() => app.db.snapshot().idle === 1)
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  const since = performance.now()
  t.equal((await app.inject('/')).statusCode, 200)
  t.ok(performance.now() - since < 250, 'it does not wait')
  t.equal((await app.inject('/')).statusCode, 503, 'who is behind it falls with it')
  t.equal((await app.inject('/')).statusCode, 200, 'who comes next has a fresh connection')
  t.equal(proxy.sessions.length, 2)
  t.match(app.db.snapshot().totals, { failedCommits: 1, opened: 2 })
  await eventually(() => proxy.sessions[0]?.closed === true)
})
