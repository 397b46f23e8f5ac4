import type { Socket } from 'node:net'
import { Readable } from 'node:stream'
import { setTimeout as moment } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type pg from 'pg'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { HttpClient, listen, openHttp } from '../support/http-client.ts'
import { add, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

/** What is in use after everything that can be freed was. */
async function heapUsed(): Promise<number> {
  for (let i = 0; i < 4; i++) {
    collect()
    await new Promise((resolve) => setImmediate(resolve))
  }
  return process.memoryUsage().heapUsed
}

/** Each route writes its note; which of them keep it is in KEPT. */
function declareRoutes(app: FastifyInstance): void {
  const noteOf = (params: unknown) => (params as { note: string }).note
  app.get('/read/:note', ({ db }) => db.selectFrom('notes').select('id').limit(1).execute())
  app.post('/write/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
  })
  app.post('/deferred/:note', async ({ db, params }) => {
    db.add(db.insertInto('notes').values({ note: noteOf(params) }))
  })
  app.post('/nested/:note', async ({ db, params }) => {
    await db.transaction().execute((trx) =>
      trx
        .insertInto('notes')
        .values({ note: noteOf(params) })
        .execute(),
    )
    await db
      .transaction()
      .execute(() => Promise.reject(new Error('inner')))
      .catch(() => {})
  })
  app.post('/client/:note', async ({ db, params }) => {
    await db.withClient((client) => client.query('insert into notes (note) values ($1)', [noteOf(params)]))
  })
  app.post('/stream/:note', async ({ db, params }, reply) => {
    await add(db, noteOf(params))
    const ids = db.selectFrom('notes').select('id').limit(20).stream(5)
    return reply.send(
      Readable.from(
        (async function* () {
          for await (const { id } of ids) yield `${id}\n`
        })(),
      ),
    )
  })
  app.post('/throw/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
    throw new Error('mine')
  })
  app.post('/conflict/:note', async ({ db, params }, reply) => {
    await add(db, noteOf(params))
    return reply.code(409).send('no')
  })
  app.post('/sqlerror/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
    await sql`select 1/0`.execute(db)
  })
  app.post('/swallowed/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
    await sql`select 1/0`.execute(db).catch(() => {})
  })
  app.post('/killed/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
    await terminate(database, await pidOf(db))
    await add(db, noteOf(params))
  })
  app.post('/left/:note', async ({ db, params }) => {
    await add(db, noteOf(params))
    await sql`select pg_sleep(0.02)`.execute(db)
  })
}
const KEPT = ['write', 'deferred', 'nested', 'client', 'stream']
const LOST = ['throw', 'conflict', 'sqlerror', 'swallowed', 'killed']

test('2,000 mixed requests leave nothing behind: rows, connections, memory', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 4, maxOverflow: 2, timeoutMillis: 30_000 } }, declareRoutes)
  const port = await listen(app)
  const accepted: string[] = []
  const wrong: string[] = []
  let sent = 0
  const one = async (i: number) => {
    const kind = i % 20 === 19 ? 'left' : i % 50 === 48 ? 'killed' : [...KEPT, 'read', ...LOST.slice(0, 4)][i % 10]!
    const url = `/${kind}/${kind}-${++sent}`
    if (kind === 'left') {
      const client = new HttpClient(port).send('POST', url)
      await moment(i % 15)
      client.destroy()
      return
    }
    const answer = await app.inject({ method: kind === 'read' ? 'GET' : 'POST', url })
    const isRight = answer.statusCode === 200 ? !LOST.includes(kind) : LOST.includes(kind)
    if (!isRight) wrong.push(`${url}: ${answer.body}`)
    else if (KEPT.includes(kind)) accepted.push(url.slice(kind.length + 2))
  }
  const round = async (requests: number) => {
    for (let done = 0; done < requests; done += 20)
      await Promise.all(Array.from({ length: 20 }, (_, i) => one(done + i)))
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
    return await heapUsed()
  }
  // The first rounds compile and cache; after them the heap has no reason to grow.
  await round(500)
  const before = await round(500)
  await round(500)
  const after = await round(500)
  t.strictSame(wrong, [])
  const kept = new Set(await notesIn(database))
  t.strictSame(
    accepted.filter((note) => !kept.has(note)),
    [],
    'every accepted write is there',
  )
  t.strictSame(
    [...kept].filter((note) => LOST.includes(note.split('-')[0]!)),
    [],
    'and no refused one',
  )
  t.match(app.db.snapshot(), { checkedOut: 0, waiting: 0, holders: [], waiters: [] })
  t.ok(app.db.snapshot().open <= 4)
  const perRequest = (after - before) / 1000
  t.ok(perRequest < 1000, `the heap grew by ${Math.round(perRequest)} bytes a request`)
})

test('listeners stay as many as they were, on clients and on kept-alive sockets', async (t) => {
  const sockets: Socket[] = []
  const listenersOf = (emitter: NodeJS.EventEmitter) =>
    emitter
      .eventNames()
      .map((name) => `${String(name)} ${emitter.listenerCount(name)}`)
      .sort()
  const app = await buildApp(t, database, { pool: { size: 1 } }, (app) => {
    declareRoutes(app)
    app.get('/listeners', ({ db }) =>
      db.withClient(async (client) => {
        const { connection } = client as pg.Client & { connection: pg.Connection }
        return [client, connection, connection.stream].map(listenersOf)
      }),
    )
  })
  app.server.on('connection', (socket) => void sockets.push(socket))
  const client = await openHttp(t, app)
  const visit = async (path: string, method = 'POST') => (await client.send(method, path).response()).status
  t.equal(await visit('/write/1'), 200)
  const ofClient = (await app.inject('/listeners')).json()
  const ofSocket = listenersOf(sockets[0]!)
  for (let i = 0; i < 40; i++) {
    for (const kind of ['write', 'deferred', 'nested', 'throw', 'client']) await visit(`/${kind}/again`)
    await visit('/read/any', 'GET')
    await visit('/nowhere', 'GET')
  }
  t.equal(sockets.length, 1, 'one socket carried them all')
  t.strictSame(listenersOf(sockets[0]!), ofSocket)
  t.strictSame((await app.inject('/listeners')).json(), ofClient)
  t.match(app.db.snapshot().totals, { opened: 1 })
})
