import { setImmediate as turn } from 'node:timers/promises'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { buildHoldableApp } from '../support/holdable-app.ts'
import { openHttp } from '../support/http-client.ts'
import { add, notesIn, pidOf, verbs } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const TIMEOUT = { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' }

test('who waits is refused after timeoutMillis, never earlier, and the connection is not lost', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 300 })
  const { answer } = await hold()
  const waits = async () => {
    const since = performance.now()
    const refusal = await app.inject('/')
    return { refusal, waited: performance.now() - since }
  }
  const waiters = [waits()]
  for (let i = 0; i < 5; i++) {
    await eventually(() => (app.db.snapshot().waiters.at(-1)?.waitedMillis ?? 0) > 20)
    waiters.push(waits())
  }
  for (const { refusal, waited } of await Promise.all(waiters)) {
    t.match(refusal.json(), TIMEOUT)
    t.ok(waited >= 300, `not after ${waited} ms`)
    t.ok(waited < 700, `but after ${waited} ms`)
    t.match(refusal.json().message, /^Pool limit of size 1 overflow 0 reached, connection timed out, timeout 0\.30 s/)
    t.match(refusal.headers['retry-after'], /^\d+$/)
  }
  t.match(app.db.snapshot(), { waiting: 0, waiters: [], totals: { timeouts: 6, checkouts: 1 } })
  release()
  t.equal((await answer).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { opened: 1 } })
})

test('a check-in that races the timeout serves or refuses, and loses nothing', async (t) => {
  const { app } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 20 }, (app) => {
    app.get('/sleep/:s', ({ db, params }) => sql`select pg_sleep(${(params as { s: string }).s}::float8)`.execute(db))
  })
  await app.inject('/')
  const counts = { served: 0, refused: 0 }
  for (let i = 0; i < 40; i++) {
    const first = app.inject(`/sleep/${0.015 + (i % 10) * 0.001}`)
    await eventually(() => app.db.snapshot().checkedOut === 1)
    for (const answer of await Promise.all([first, app.inject('/'), app.inject('/')])) {
      if (answer.statusCode === 200) counts.served++
      else {
        t.match(answer.json(), TIMEOUT)
        counts.refused++
      }
    }
    // Who was refused behind an unanswered COMMIT has a ROLLBACK to send.
    await eventually(() => app.db.snapshot().idle === 1)
    t.match(app.db.snapshot(), { checkedOut: 0, waiting: 0, open: 1 })
  }
  const { totals } = app.db.snapshot()
  t.equal(totals.timeouts, counts.refused)
  t.equal(totals.commits, counts.served + 1)
  t.equal(totals.checkouts, totals.commits + totals.rollbacks)
})

test('an app that computes past the timeout does not refuse who could have been served', async (t) => {
  const { app } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 50 })
  for (let i = 0; i < 5; i++) {
    let waiter: Promise<{ statusCode: number }> | undefined
    await app.db.session(async (db) => {
      await pidOf(db)
      waiter = app.inject('/')
      await eventually(() => app.db.snapshot().waiting === 1)
      const committed = db.commit()
      await turn()
      for (const until = performance.now() + 100; performance.now() < until; );
      await committed
    })
    t.equal((await waiter)?.statusCode, 200)
  }
})

test('timeoutMillis 0 refuses at once what would have to wait, and nothing else', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, maxOverflow: 1, timeoutMillis: 0 })
  const held = [await hold(), await hold()]
  const since = performance.now()
  const refusal = await app.inject('/')
  t.match(refusal.json(), { ...TIMEOUT, message: /timeout 0\.00 s/ })
  t.ok(performance.now() - since < 200)
  t.match(app.db.snapshot(), { waiting: 0, checkedOut: 2, totals: { timeouts: 1 } })
  release()
  for (const { answer } of held) t.equal((await answer).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
})

test('a client that leaves the queue is forgotten at once', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1 })
  const { answer } = await hold()
  const clients = await Promise.all([1, 2, 3].map(() => openHttp(t, app)))
  for (const [index, client] of clients.entries()) {
    client.send('GET', '/')
    await eventually(() => app.db.snapshot().waiting === index + 1)
  }
  clients[1]!.destroy()
  await eventually(() => app.db.snapshot().waiting === 2)
  clients[0]!.reset()
  await eventually(() => app.db.snapshot().waiting === 1)
  t.equal(app.db.snapshot().waiters.length, 1)
  release()
  t.equal((await clients[2]!.response()).status, 200)
  t.equal((await answer).statusCode, 200)
  t.match(app.db.snapshot(), { totals: { checkouts: 2, timeouts: 0, cancels: 0 } })
})

test('a client that leaves while its connection is opened leaves an idle connection behind', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  const startup = proxy.trap({ from: 'client', type: 'startup' }, 'hold')
  const client = (await openHttp(t, app)).send('GET', '/')
  await startup.sprung
  client.destroy()
  await eventually(() => app.db.snapshot().waiters.length === 0)
  startup.release()
  await eventually(() => app.db.snapshot().idle === 1)
  t.match(app.db.snapshot(), { open: 1, checkedOut: 0, totals: { checkouts: 0, opened: 1 } })
  t.strictSame(proxy.flights, [])
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal(proxy.sessions.length, 1)
})

test('a client that leaves while an idle connection is pinged leaves it idle', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = {
    connectionString: proxy.connectionString,
    pool: { prePing: { idleMillis: 0, timeoutMillis: 5000 } },
  }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  await app.inject('/')
  proxy.clear()
  const ping = proxy.trap({ from: 'client', type: 'S' }, 'hold')
  const client = (await openHttp(t, app)).send('GET', '/')
  await ping.sprung
  client.destroy()
  await eventually(() => app.db.snapshot().waiters.length === 0)
  ping.release()
  await eventually(() => app.db.snapshot().idle === 1)
  t.strictSame(verbs(proxy), [[]], 'the ping, and no BEGIN')
  t.match(app.db.snapshot(), { open: 1, totals: { checkouts: 1, opened: 1 } })
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`${commitOn}: a handler that asks its own app for a second connection gets an error, not a deadlock`, async (t) => {
    const options = { commitOn, pool: { size: 1, timeoutMillis: 100 } }
    const app = await buildApp(t, database, options, (app) => {
      app.get('/inner', ({ db }) => pidOf(db))
      app.post('/outer/:end', async ({ db, params }) => {
        await add(db, 'outer')
        const inner = await app.inject('/inner')
        t.match(inner.json(), TIMEOUT)
        if ((params as { end: string }).end === 'throw') throw new Error('mine')
        return inner.statusCode
      })
    })
    t.match((await app.inject({ method: 'POST', url: '/outer/throw' })).json(), { message: 'mine' })
    t.strictSame(await notesIn(database), [])
    const outer = await app.inject({ method: 'POST', url: '/outer/return' })
    t.equal(outer.body, '503')
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notesIn(database), ['outer'])
    t.match(app.db.snapshot(), { open: 1, totals: { timeouts: 2 } })
  })
}

test('a second session inside a request waits for the pool like anybody else', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 1, timeoutMillis: 100 } }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'outer')
      await app.db.session((second) => add(second, 'inner'))
    })
  })
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), TIMEOUT)
  t.strictSame(await notesIn(database), [])
})

test('a handler may catch the refusal and try again on the same session', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 50 }, (app) => {
    app.post('/', async ({ db }) => {
      await t.rejects(add(db, 'never'), { code: TIMEOUT.code, retryable: true, headers: { 'retry-after': /\d/ } })
      t.equal(db.state, 'idle')
      release()
      await eventually(() => app.db.snapshot().checkedOut === 0)
      await add(db, 'second try')
      return 'ok'
    })
  })
  const { answer } = await hold()
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.equal((await answer).statusCode, 200)
  t.strictSame(await notesIn(database), ['second try'])
})

test('a handler may catch the refusal and answer without the database', async (t) => {
  const { app, hold, release } = await buildHoldableApp(t, database, { size: 1, timeoutMillis: 0 }, (app) => {
    app.get('/cached', ({ db }) => pidOf(db).catch(() => 'from the cache'))
  })
  const { answer } = await hold()
  t.match(await app.inject('/cached'), { statusCode: 200, body: 'from the cache' })
  release()
  await answer
})
