import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import requestDb, { type RequestDbOptions } from '../lib/index.ts'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { handmade } from './support/handmade.ts'
import { openHttp } from './support/http-client.ts'
import { holds, inBothModes } from './support/modes.ts'
import { add, notesIn } from './support/notebook.ts'
import { startProxy } from './support/proxy.ts'
import { NOTES } from './support/schema.ts'
import { type Test, t, test } from './support/test.ts'

/* app.close(): what is in flight is finished, what waits is told, and nothing stays open on the server. */
const database = await createDatabase(t, { sql: NOTES })

/** A route that writes, waits for the gate, and writes again. */
async function waiting(t: Test, options: RequestDbOptions = {}, fastifyOptions: object = {}) {
  await database.query('delete from notes')
  const goOn = gate()
  const routes = (app: FastifyInstance) => {
    app.post('/', async (request) => {
      await add(request.db, 'a')
      await goOn.opened
      await add(request.db, 'b')
      return 'ok'
    })
    app.get('/sleep', async (request) => {
      await add(request.db, 'x')
      await sql`select pg_sleep(30)`.execute(request.db)
      return 'ok'
    })
  }
  const app = await buildApp(t, database, options, routes, fastifyOptions)
  const holding = (statements = 1) =>
    eventually(() => app.db.snapshot().holders.some((holder) => holder.statements === statements))
  return { app, goOn, holding }
}

async function isClosed(t: Test, app: FastifyInstance): Promise<void> {
  t.match(app.db.snapshot(), { open: 0, idle: 0, checkedOut: 0, waiting: 0 })
  // A backend that has hung up takes a moment to disappear.
  await eventually(async () => (await database.backends()).length === 0, { withinMillis: 500 })
  for (const use of [() => app.db.ping(), () => app.db.session((db) => add(db, 'late')), () => addAlone(app)]) {
    await t.rejects(async () => void (await use()), { code: 'FST_REQUEST_DB_POOL_CLOSED', statusCode: 503 })
  }
}

const addAlone = async (app: FastifyInstance): Promise<unknown> =>
  app.db.kysely.insertInto('notes').values({ note: 'late' }).execute()

inBothModes(
  database,
  'a request in flight is finished and kept, the next on its socket is turned away',
  async (t, commitOn) => {
    const { app, goOn, holding } = await waiting(t, { commitOn })
    const client = await openHttp(t, app)
    client.send('POST', '/', { body: {} })
    await holding()
    const closed = app.close()
    client.send('POST', '/', { body: {} })
    goOn.open()
    t.equal((await client.response()).status, 200)
    const next = await client.response().catch(() => undefined)
    t.ok(next === undefined || next.status === 503)
    await closed
    await holds(t, database, ['a', 'b'])
    await isClosed(t, app)
  },
)

inBothModes(database, 'who waits for a connection is told at once, who has one may finish', async (t, commitOn) => {
  const { app, goOn, holding } = await waiting(t, { commitOn, pool: { size: 1 } })
  const [holder, waiter] = [await openHttp(t, app), await openHttp(t, app)]
  holder.send('POST', '/', { body: {} })
  await holding()
  waiter.send('POST', '/', { body: {} })
  await eventually(() => app.db.snapshot().waiting === 1)
  const closed = app.close()
  t.match(await waiter.response(), { status: 503, body: /FST_REQUEST_DB_POOL_CLOSED/ })
  t.equal(app.db.snapshot().checkedOut, 1)
  goOn.open()
  t.equal((await holder.response()).status, 200)
  // Clients that keep their connection, and do nothing with it, would hold Fastify up.
  for (const client of [holder, waiter]) client.destroy()
  await closed
  await holds(t, database, ['a', 'b'])
  await isClosed(t, app)
})

inBothModes(
  database,
  'a request in flight that has not asked yet still gets a free connection',
  async (t, commitOn) => {
    await database.query('delete from notes')
    const arrived = gate()
    const goOn = gate()
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.post('/', async (request) => {
        arrived.open()
        await goOn.opened
        await add(request.db, 'x')
        return 'ok'
      })
    })
    await app.db.ping()
    const client = await openHttp(t, app)
    client.send('POST', '/', { body: {} })
    await arrived.opened
    const closed = app.close()
    await app.db.ping()
    goOn.open()
    t.equal((await client.response()).status, 200)
    client.destroy()
    await closed
    await holds(t, database, ['x'])
  },
)

inBothModes(database, 'a stream in flight is sent whole', async (t, commitOn) => {
  await database.query('delete from notes')
  const goOn = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) =>
      Readable.from(
        (async function* () {
          await add(request.db, 'a')
          yield 'first '
          await goOn.opened
          await add(request.db, 'b')
          yield 'last'
        })(),
      ),
    )
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await client.receives('first')
  const closed = app.close()
  goOn.open()
  t.equal((await client.response()).body, 'first last')
  client.destroy()
  await closed
  await holds(t, database, ['a', 'b'])
  await isClosed(t, app)
})

for (const isInTime of [true, false]) {
  inBothModes(
    database,
    `an injected request that ends ${isInTime ? 'within' : 'after'} the grace`,
    async (t, commitOn) => {
      const closeGraceMillis = isInTime ? 5000 : 50
      const { app, goOn, holding } = await waiting(t, { commitOn, closeGraceMillis })
      const answer = app.inject({ method: 'POST', url: '/' })
      await holding()
      const closed = app.close()
      if (isInTime) goOn.open()
      await closed
      goOn.open()
      if (isInTime) t.equal((await answer).statusCode, 200)
      else t.match(await answer, { statusCode: 503, body: /FST_REQUEST_DB_POOL_CLOSED/ })
      await holds(t, database, isInTime ? ['a', 'b'] : [])
      await isClosed(t, app)
    },
  )
}

inBothModes(database, 'a long statement of an injected request is cancelled after the grace', async (t, commitOn) => {
  const { app, holding } = await waiting(t, { commitOn, closeGraceMillis: 50 })
  const answer = app.inject('/sleep')
  await holding(2)
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 2000, 'and not after thirty seconds')
  t.ok((await answer).statusCode >= 500)
  await holds(t, database, [])
  await isClosed(t, app)
})

inBothModes(database, 'a long statement over a socket is cancelled after the grace', async (t, commitOn) => {
  const { app, holding } = await waiting(t, { commitOn, closeGraceMillis: 50 })
  const client = await openHttp(t, app)
  client.send('GET', '/sleep')
  await holding(2)
  const since = performance.now()
  const closed = app.close()
  t.ok((await client.response()).status >= 500)
  client.destroy()
  await closed
  t.ok(performance.now() - since < 2000, 'and not after thirty seconds')
  await holds(t, database, [])
  await isClosed(t, app)
})

inBothModes(database, 'a handler that never ends loses its session after the grace', async (t, commitOn) => {
  const { app, holding } = await waiting(t, { commitOn, closeGraceMillis: 50 })
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await holding()
  const closed = app.close()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  // Fastify waits for the handler as long as its client does.
  client.destroy()
  await closed
  await holds(t, database, [])
  await isClosed(t, app)
})

inBothModes(database, 'a client that has left before the close', async (t, commitOn) => {
  const { app, goOn, holding } = await waiting(t, { commitOn })
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await holding()
  client.destroy()
  await app.close()
  goOn.open()
  await holds(t, database, [])
  await isClosed(t, app)
})

inBothModes(
  database,
  'forceCloseConnections cuts the sockets, and their sessions are rolled back',
  async (t, commitOn) => {
    const { app, goOn, holding } = await waiting(t, { commitOn }, { forceCloseConnections: true })
    const client = await openHttp(t, app)
    client.send('POST', '/', { body: {} })
    await holding()
    await app.close()
    await t.rejects(client.response())
    goOn.open()
    await holds(t, database, [])
    await isClosed(t, app)
  },
)

test('a session in the background may finish within the grace, and loses its connection after it', async (t) => {
  for (const closeGraceMillis of [5000, 50]) {
    await database.query('delete from notes')
    const goOn = gate()
    const app = await buildApp(t, database, { closeGraceMillis })
    const session = app.db.session(async (db) => {
      await add(db, 'a')
      await goOn.opened
      await add(db, 'b')
    })
    session.catch(() => {})
    await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
    const closed = app.close()
    if (closeGraceMillis === 5000) goOn.open()
    await closed
    goOn.open()
    if (closeGraceMillis === 5000) await session
    else await t.rejects(session, { code: 'FST_REQUEST_DB_POOL_CLOSED' })
    await holds(t, database, closeGraceMillis === 5000 ? ['a', 'b'] : [])
  }
})

test('idle connections say goodbye', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString })
  await Promise.all([app.db.ping(), app.db.ping(), app.db.ping()])
  await app.close()
  t.strictSame(
    proxy.sessions.map(({ terminated }) => terminated),
    [true, true, true],
  )
  t.match(app.db.snapshot(), { open: 0, totals: { closed: 3, invalidated: 0 } })
})

test('half-open idle connections do not hold it up', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString })
  await Promise.all([app.db.ping(), app.db.ping()])
  proxy.swallow({ passesClose: false })
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 2000)
  t.match(app.db.snapshot(), { open: 0 })
  proxy.cut('reset')
})

test('closed twice, at the same time and one after the other', async (t) => {
  const { app } = await waiting(t)
  await app.db.ping()
  await Promise.all([app.close(), app.close()])
  await app.close()
  await isClosed(t, app)
})

test('closed before it is ready, and right after it was', async (t) => {
  const { app, connectionString } = handmade(t, database)
  app.register(requestDb, { connectionString })
  await app.close()
  const other = handmade(t, database)
  other.app.register(requestDb, { connectionString })
  await other.app.ready()
  await other.app.close()
  t.strictSame(await database.backends(), [])
})

test('closed after a connection has failed, and while one is being opened', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  await proxy.refuse()
  const { app } = await waiting(t, { connectionString: proxy.connectionString })
  t.match(await app.inject({ method: 'POST', url: '/' }), { statusCode: 503, body: /FST_REQUEST_DB_UNAVAILABLE/ })
  await proxy.accept()
  proxy.silenceStartup()
  const answer = app.inject({ method: 'POST', url: '/' })
  await eventually(() => proxy.recordings.length === 1)
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 2000, 'it does not wait for a silent server')
  t.match(await answer, { statusCode: 503, body: /FST_REQUEST_DB_(POOL_CLOSED|UNAVAILABLE)/ })
  await eventually(() => proxy.recordings.every(({ closed }) => closed))
})

test('hooks of onClose find the pool open where they were added after it, or in a child scope', async (t) => {
  await database.query('delete from notes')
  const outcomes: Record<string, string> = {}
  const { app, connectionString, ready } = handmade(t, database)
  const hook = (name: string) => async () => {
    await app.db
      .session((db) => add(db, name))
      .then(
        () => {
          outcomes[name] = 'kept'
        },
        (error) => {
          outcomes[name] = error.code
        },
      )
  }
  app.addHook('onClose', hook('before'))
  await app.register(requestDb, { connectionString })
  app.addHook('onClose', hook('after'))
  app.register(async (scope) => void scope.addHook('onClose', hook('child')))
  await ready()
  await app.close()
  t.strictSame(outcomes, { child: 'kept', after: 'kept', before: 'FST_REQUEST_DB_POOL_CLOSED' })
  t.strictSame((await notesIn(database)).sort(), ['after', 'child'])
  t.strictSame(await database.backends(), [])
})
