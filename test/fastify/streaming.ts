import { once } from 'node:events'
import { Readable } from 'node:stream'
import multipart from '@fastify/multipart'
import websocket from '@fastify/websocket'
import type { FastifyInstance } from 'fastify'
import WebSocket from 'ws'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { listen, openHttp } from '../support/http-client.ts'
import { add, notesIn } from '../support/notebook.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* What lasts longer than a request should: sockets, events, uploads. None of them holds a connection meanwhile. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))
const WITHIN = { withinMillis: 10_000 }

test('WebSocket: a session for each message, and a socket that closes ends what it began', async (t) => {
  const slow = gate()
  const errors: unknown[] = []
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(websocket)
    app.get('/socket', { websocket: true }, (socket, request) => {
      const closed = new AbortController()
      socket.on('close', () => closed.abort())
      socket.on('message', (message) => {
        const note = String(message)
        app.db
          .session({ name: 'socket', signal: closed.signal }, async (db) => {
            await add(db, note)
            if (note === 'slow') {
              slow.open()
              await new Promise(() => {})
            }
            if (note === 'bad') throw new Error('no')
          })
          .then(
            () => socket.send(`kept ${note}`),
            (error: Error) => {
              errors.push(error.name)
              socket.send(`refused ${note}`)
            },
          )
      })
      t.equal(request.db.state, 'idle')
    })
  })
  const client = new WebSocket(`ws://127.0.0.1:${await listen(app)}/socket`)
  await once(client, 'open')
  const say = async (note: string) => {
    client.send(note)
    return String((await once(client, 'message'))[0])
  }
  t.equal(await say('one'), 'kept one')
  t.equal(app.db.snapshot().checkedOut, 0, 'between two messages nothing is held')
  t.equal(await say('bad'), 'refused bad')
  t.equal(await say('two'), 'kept two')
  client.send('slow')
  await slow.opened
  t.equal(app.db.snapshot().checkedOut, 1)
  client.terminate()
  await eventually(() => app.db.snapshot().checkedOut === 0, WITHIN)
  t.strictSame(await notesIn(database), ['one', 'two'])
  t.strictSame(errors, ['Error', 'AbortError'])
})

test('WebSocket: request.db of the upgrade, used in a message, lasts as long as the socket and is rolled back', async (t) => {
  const used = gate()
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(websocket)
    app.get('/socket', { websocket: true }, (socket, { db }) => {
      socket.on(
        'message',
        () =>
          void add(db, 'never')
            .finally(() => used.open())
            .catch(() => {}),
      )
    })
  })
  const client = new WebSocket(`ws://127.0.0.1:${await listen(app)}/socket`)
  await once(client, 'open')
  client.send('x')
  await used.opened
  client.terminate()
  await eventually(() => app.db.snapshot().checkedOut === 0, WITHIN)
  t.strictSame(await notesIn(database), [])
})

test('server-sent events: settled before the stream, a session for each event, nothing held in between', async (t) => {
  const steps = [gate(), gate()]
  let sent = 0
  const app = await buildApp(t, database, { pool: { size: 1 } }, (app) => {
    app.get('/events', async ({ db }, reply) => {
      await add(db, 'subscribed')
      await db.commit()
      async function* events() {
        for (const step of steps) {
          await step.opened
          const notes = await app.db.session({ readOnly: true }, (db) => db.selectFrom('notes').selectAll().execute())
          sent++
          yield `data: ${notes.length}\n\n`
        }
        await new Promise(() => {})
      }
      return reply.type('text/event-stream').send(Readable.from(events()))
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/events')
  await eventually(async () => (await notesIn(database)).length === 1, WITHIN)
  await nothingIsLeft(t)
  steps[0]!.open()
  await client.receives('data: 1')
  await app.db.session((db) => add(db, 'news'))
  steps[1]!.open()
  await client.receives('data: 2')
  client.destroy()
  await nothingIsLeft(t)
  t.equal(sent, 2)
})

const FORM = 'multipart/form-data; boundary=x'
const part = (text: string) => `--x\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n${text}\r\n`

function uploads(app: FastifyInstance): void {
  app.post('/files', async (request) => {
    const file = await request.file()
    // First the file, however slow it comes; then the first statement, and with it the connection.
    const text = String(await file?.toBuffer())
    await add(request.db, text)
    return { text }
  })
}

test('an upload is received before the first statement: no connection waits for a slow client', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(multipart)
    uploads(app)
  })
  const body = `${part('content')}--x--\r\n`
  const answer = await app.inject({ method: 'POST', url: '/files', headers: { 'content-type': FORM }, payload: body })
  t.strictSame(answer.json(), { text: 'content' })
  const client = await openHttp(t, app)
  client.send('POST', '/files', { body, headers: { 'content-type': FORM }, withhold: 20 })
  await app.db.ping()
  t.equal(app.db.snapshot().checkedOut, 0)
  client.destroy()
  await nothingIsLeft(t)
  t.strictSame(await notesIn(database), ['content'])
})

test('an upload that is too long, or cut off, leaves no row', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(multipart, { limits: { fileSize: 4 } })
    uploads(app)
  })
  const post = (payload: string) =>
    app.inject({ method: 'POST', url: '/files', headers: { 'content-type': FORM }, payload })
  t.equal((await post(`${part('too long')}--x--\r\n`)).statusCode, 413)
  t.ok((await post(part('cut').slice(0, -4))).statusCode >= 400)
  t.strictSame(await notesIn(database), [])
})
