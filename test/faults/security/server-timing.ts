import { PassThrough } from 'node:stream'
import type { FastifyInstance, FastifyReply, FastifyServerOptions } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { openHttp } from '../../support/http-client.ts'
import { openHttp2 } from '../../support/http2-client.ts'
import { add, notesIn, pidOf } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Server-Timing in every way an answer can leave: figures and nothing else, and never in the way of the answer. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const FIGURES = 'db-wait;dur=[\\d.]+, db-hold;dur=[\\d.]+, db-busy;dur=[\\d.]+'
const only = new RegExp(`^${FIGURES}$`)
const timed = (
  t: Test,
  routes: (app: FastifyInstance) => unknown,
  fastifyOptions?: FastifyServerOptions & { http2?: true },
) => buildApp(t, database, { serverTiming: true }, routes, fastifyOptions)

test('nothing of what a client or a statement says is in it: names of routes, headers, SQL, errors', async (t) => {
  const app = await timed(t, (app) => {
    app.get<{ Params: { word: string } }>('/x;desc="y"/:word', async ({ db, params, headers }) => {
      await sql`select ${params.word}::text as "a, b;dur=9", ${String(headers['x-word'])}::text`.execute(db)
      return 'done'
    })
    app.get<{ Params: { word: string } }>('/fails/:word', ({ db, params }) =>
      sql`select ${params.word}::int`.execute(db),
    )
  })
  for (const word of ['evil%0d%0aset-cookie:%20a=b', 'evil;desc=%22x%22', 'evil,%20evil;dur=1']) {
    for (const url of [`/x;desc="y"/${word}`, `/fails/${word}`]) {
      const { headers } = await app.inject({ url: encodeURI(decodeURI(url)), headers: { 'x-word': 'evil, evil' } })
      t.match(headers['server-timing'], only)
      t.notOk('set-cookie' in headers)
    }
  }
})

const OWN: [string, (reply: FastifyReply) => unknown, RegExp][] = [
  ['text', (reply) => reply.header('Server-Timing', 'render;dur=1'), new RegExp(`^render;dur=1, ${FIGURES}$`)],
  ['a number', (reply) => reply.header('server-timing', 5), new RegExp(`^5, ${FIGURES}$`)],
  ['a list', (reply) => reply.header('server-timing', ['a', 'b']), new RegExp(`^a, ?b, ${FIGURES}$`)],
  ['nothing', (reply) => reply.header('server-timing', ''), only],
  ['of the raw response', (reply) => reply.raw.setHeader('server-timing', 'raw'), new RegExp(`^raw, ${FIGURES}$`)],
]
for (const [what, say, expected] of OWN) {
  test(`what the app itself says there, ${what}, stays in front`, async (t) => {
    const app = await timed(t, (app) => {
      app.get('/', async ({ db }, reply) => {
        say(reply)
        return pidOf(db)
      })
    })
    t.match((await app.inject('/')).headers['server-timing'], expected)
  })
}

test('a header of the app that cannot be sent is the app’s error, and nothing is committed', async (t) => {
  const app = await timed(t, (app) => {
    app.post('/', async ({ db }, reply) => {
      await add(db, 'lost')
      reply.header('server-timing', 'a\r\nset-cookie: b=c')
      return 'done'
    })
  })
  const client = await openHttp(t, app)
  const { status, headers } = await client.send('POST', '/').response()
  t.equal(status, 500)
  t.notOk('set-cookie' in headers)
  t.strictSame(await notesIn(database), [])
})

test('answers whose head has left, or that have no body, are not disturbed', async (t) => {
  const app = await timed(t, (app) => {
    app.get('/hijacked', async ({ db }, reply) => {
      await add(db, 'hijacked')
      reply.hijack()
      await db.commit()
      reply.raw.writeHead(200, { 'content-length': 2 }).end('ok')
    })
    app.get('/stream', async ({ db }, reply) => {
      await add(db, 'stream')
      const body = new PassThrough()
      body.end('ok')
      return reply.send(body)
    })
    app.get('/head-first', async ({ db }, reply) => {
      reply.raw.writeHead(200, { 'content-length': 2 })
      await pidOf(db)
      reply.raw.end('ok')
      return reply
    })
    app.get('/304', async ({ db }, reply) => {
      await add(db, '304')
      return reply.code(304).send()
    })
    app.get('/204', async ({ db }, reply) => {
      await add(db, '204')
      return reply.code(204).send()
    })
  })
  const client = await openHttp(t, app)
  const ask = (path: string) => client.send('GET', path).response()
  t.match(await ask('/hijacked'), { status: 200, body: 'ok' })
  t.match(await ask('/stream'), { status: 200, body: 'ok', headers: { 'server-timing': only } })
  t.match(await ask('/head-first'), { status: 200, body: 'ok' })
  t.match(await ask('/304'), { status: 304, headers: { 'server-timing': only } })
  t.match(await ask('/204'), { status: 204, headers: { 'server-timing': only } })
  t.strictSame(await notesIn(database), ['hijacked', 'stream', '304', '204'])
})

test('over HTTP/2 it is the same', async (t) => {
  const app = await timed(t, (app) => app.get('/', ({ db }) => pidOf(db)), { http2: true })
  const { session } = await openHttp2(t, app)
  const headers = await new Promise<Record<string, unknown>>((resolve) => {
    session.request({ ':path': '/' }).on('response', (head) => resolve(head))
  })
  t.match(headers, { ':status': 200, 'server-timing': only })
})
