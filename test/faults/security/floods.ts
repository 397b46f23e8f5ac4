import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { type HttpClient, listen, openHttp } from '../../support/http-client.ts'
import { openHttp2 } from '../../support/http2-client.ts'
import { add, notesIn, pidOf } from '../../support/notebook.ts'
import { nothingIsLeft } from '../../support/nothing-left.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* What clients that nobody knows can do to the pool by being many, slow or gone. */

const database = await createDatabase(t, {
  sql: `${NOTES}; create table many (n int primary key, text text);
    insert into many select n, repeat('x', 1000) from generate_series(1, 20000) n`,
})
t.beforeEach(() => database.query('delete from notes'))

async function manyClients(t: Test, app: FastifyInstance, count: number): Promise<HttpClient[]> {
  await listen(app)
  return Promise.all(Array.from({ length: count }, () => openHttp(t, app)))
}

/** Afterwards all is at rest, and who comes next is served. */
async function isServing(t: Test, app: FastifyInstance): Promise<void> {
  await nothingIsLeft(t, 5000)
  t.equal((await app.inject('/ordinary')).statusCode, 200, 'the next one is served')
  const { open, size, totals } = app.db.snapshot()
  t.equal(open, totals.opened - totals.closed - totals.recycled - totals.invalidated)
  t.ok(open <= size)
}

const ordinary = (app: FastifyInstance) => app.get('/ordinary', ({ db }) => pidOf(db))

test('two hundred clients that send a request and leave at once, three times', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 4 } }, (app) => {
    ordinary(app)
    app.post('/:note', async ({ db, params }) => {
      await add(db, (params as { note: string }).note)
      return 'done'
    })
  })
  const kept: string[] = []
  for (let round = 0; round < 3; round++) {
    const clients = await manyClients(t, app, 200)
    await Promise.all(
      clients.map(async (client, at) => {
        client.send('POST', `/${round}-${at}`)
        if (at % 10 !== 0) return client.destroy()
        const { status } = await client.response()
        if (status === 200) kept.push(`${round}-${at}`)
      }),
    )
  }
  await isServing(t, app)
  const rows = new Set(await notesIn(database))
  t.equal(kept.length, 60, 'who stays is served')
  t.strictSame(
    kept.filter((note) => !rows.has(note)),
    [],
  )
})

test('uploads that never end hold no connection', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 } }, (app) => {
    ordinary(app)
    app.post('/upload', async ({ db }) => void (await add(db, 'uploaded')))
  })
  const clients = await manyClients(t, app, 100)
  for (const client of clients) client.send('POST', '/upload', { body: { a: 1 }, withhold: 2 })
  const other = await openHttp(t, app)
  t.equal((await other.send('GET', '/ordinary').response()).status, 200)
  t.match(app.db.snapshot(), { open: 1, checkedOut: 0, waiting: 0 })
  for (const client of clients) client.destroy()
  await isServing(t, app)
  t.strictSame(await notesIn(database), [])
})

test('uploads that never end, of a route that has used its session before: maxSessionMillis ends them', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 }, maxSessionMillis: 300 }, (app) => {
    ordinary(app)
    app.post(
      '/upload',
      { onRequest: async ({ db }) => add(db, 'lost') as Promise<unknown> as Promise<void> },
      () => 'x',
    )
  })
  const clients = await manyClients(t, app, 6)
  for (const client of clients) client.send('POST', '/upload', { body: { a: 1 }, withhold: 2 })
  await eventually(() => app.db.snapshot().waiting > 0)
  t.equal((await app.inject('/ordinary')).statusCode, 200, 'served behind them')
  for (const client of clients) client.destroy()
  await isServing(t, app)
  t.strictSame(await notesIn(database), [])
})

test('more than may wait are refused at once, and told when to come back; who waits is served in order', async (t) => {
  const held = gate()
  const goOn = gate()
  const served: number[] = []
  const app = await buildApp(t, database, { pool: { size: 1, maxWaiting: 10 } }, (app) => {
    ordinary(app)
    app.get('/hold', async ({ db }) => {
      const pid = await pidOf(db)
      held.open()
      await goOn.opened
      return pid
    })
    app.get<{ Params: { n: number } }>('/wait/:n', async ({ db, params: { n } }) => {
      await pidOf(db)
      served.push(Number(n))
      return n
    })
  })
  const [holder, ...clients] = await manyClients(t, app, 201)
  holder?.send('GET', '/hold')
  await held.opened
  for (const [n, client] of clients.entries()) {
    client.send('GET', `/wait/${n}`)
    if (n < 10) await eventually(() => app.db.snapshot().waiting === n + 1)
  }
  const refused = await Promise.all(clients.slice(10).map((client) => client.response()))
  t.ok(refused.every(({ status, headers }) => status === 503 && Number(headers['retry-after']) >= 1))
  t.ok(refused.every(({ body }) => body.includes('FST_REQUEST_DB_POOL_SATURATED')))
  t.match(app.db.snapshot(), { waiting: 10, checkedOut: 1, totals: { saturated: 190 } })
  goOn.open()
  const answers = await Promise.all(clients.slice(0, 10).map((client) => client.response()))
  t.ok(answers.every(({ status }) => status === 200))
  t.strictSame(served, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
  await isServing(t, app)
})

test('a hundred requests pipelined on a socket that is closed', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 } }, (app) => {
    ordinary(app)
    app.post('/', async ({ db }) => void (await add(db, 'x')))
  })
  for (let round = 0; round < 3; round++) {
    const client = await openHttp(t, app)
    for (let n = 0; n < 100; n++) client.send('POST', '/', { body: {} })
    await eventually(() => app.db.snapshot().totals.checkouts > round)
    client.destroy()
    await nothingIsLeft(t, 5000)
  }
  await isServing(t, app)
})

test('two hundred streams of HTTP/2 that are reset as soon as they are opened', async (t) => {
  const app = await buildApp(
    t,
    database,
    { pool: { size: 2 } },
    (app) => {
      ordinary(app)
      app.post('/', async ({ db }) => void (await add(db, 'x')))
    },
    { http2: true },
  )
  const client = await openHttp2(t, app)
  for (let n = 0; n < 200; n++) client.send('POST', '/', { body: {} }).reset()
  await isServing(t, app)
})

test('twenty who read a large answer slowly are cut, and those who ask meanwhile are served', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 22 }, maxSessionMillis: 800 }, (app) => {
    ordinary(app)
    app.get('/rows', ({ db }) => {
      const rows = db.withTables<{ many: { n: number; text: string } }>().selectFrom('many').selectAll().stream(50)
      return Readable.from(rows, { objectMode: true }).map(({ text }: { text: string }) => text)
    })
  })
  const clients = await manyClients(t, app, 20)
  for (const client of clients) {
    client.send('GET', '/rows')
    await client.receives('200 OK')
    client.pause()
  }
  const isHeld = () => app.db.snapshot().holders.some(({ route }) => route === '/rows')
  let served = 0
  while (isHeld()) {
    t.equal((await app.inject('/ordinary')).statusCode, 200)
    served++
  }
  t.ok(served > 0)
  for (const client of clients) client.resume()
  await eventually(() => clients.every(({ closed }) => closed))
  await isServing(t, app)
})
