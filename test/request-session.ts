import type { FastifyReply, FastifyRequest } from 'fastify'
import { isSuccess } from '../lib/request-session.ts'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { gate } from './support/gate.ts'
import { openHttp } from './support/http-client.ts'
import { holds, inBothModes } from './support/modes.ts'
import { add } from './support/notebook.ts'
import { NOTES } from './support/schema.ts'
import { type Test, t, test } from './support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

test('an answer below 400 is a success', async (t) => {
  const verdicts = [100, 200, 204, 302, 304, 399, 400, 404, 500, 503].map((statusCode) =>
    isSuccess({} as FastifyRequest, { statusCode } as FastifyReply),
  )
  t.strictSame(verdicts, [true, true, true, true, true, true, false, false, false, false])
})

type End = (request: FastifyRequest, reply: FastifyReply) => unknown

/** What the client is told and what is kept have to agree: a good answer for a row that is there, or neither. */
async function agree(t: Test, commitOn: 'onSend' | 'onResponse', end: End): Promise<void> {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      return end(request, reply)
    })
  })
  const client = await openHttp(t, app)
  const asks = {
    inject: () => app.inject('/').then(({ statusCode }) => statusCode),
    socket: () =>
      client
        .send('GET', '/')
        .response()
        .then(({ status }) => status),
  }
  for (const [how, ask] of Object.entries(asks)) {
    const status = await ask().catch(() => 'cut off')
    const isGood = typeof status === 'number' && status < 400
    await holds(t, database, isGood ? ['x'] : [])
    t.comment(`${how}: ${status}`)
    await database.query('delete from notes')
  }
}

const ends: Record<string, End> = {
  'an answer with cookies, numbers and an empty header': (_, reply) =>
    reply.header('set-cookie', ['a=1', 'b=2']).header('x-count', 3).header('x-empty', undefined).send('x'),
  'an answer of bytes': (_, reply) => reply.send(new Uint8Array([1, 2, 3])),
  'a header with a line break in it': (_, reply) => reply.header('x-note', 'a\r\nb').send('x'),
  'a cookie among others that cannot be': (_, reply) => reply.header('set-cookie', ['a=1', 'b=\n']).send('x'),
  'a header whose name cannot be': (_, reply) => reply.header('a name', 'x').send('x'),
  'a 204 with a payload that is dropped': (_, reply) => reply.code(204).type('text/plain').send({ ok: true }),
  'a payload that cannot be, on HEAD and GET': (_, reply) => reply.type('text/plain').send({ ok: true }),
  'a locked web stream': () => {
    const stream = new ReadableStream()
    stream.getReader()
    return stream
  },
  'a status that cannot be': (_, reply) => {
    reply.raw.statusCode = 42
    return 'x'
  },
  'an error that is thrown behind reply.send()': async (_, reply) => {
    reply.send('sent')
    throw new Error('late')
  },
  'an error that is sent behind reply.send()': async (_, reply) => {
    reply.send('sent')
    reply.send(new Error('late'))
  },
  'reply.send() twice': async (_, reply) => {
    reply.send('first')
    reply.send('second')
  },
  'reply.send() of an error, then of a value': async (_, reply) => {
    reply.send(new Error('first'))
    reply.send('second')
  },
  'reply.send() and another value returned': async (_, reply) => {
    reply.send('first')
    return 'second'
  },
}

for (const [name, end] of Object.entries(ends)) {
  inBothModes(database, `${name}: the answer and the row agree`, (t, commitOn) => agree(t, commitOn, end))
}

inBothModes(database, 'raw bytes before the answer: it is cut off', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      reply.raw.write('raw')
      return 'x'
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await t.rejects(client.response())
  await holds(t, database, [])
})

inBothModes(
  database,
  'a handler that answers while it still writes: those writes are in, or refused',
  async (t, commitOn) => {
    const outcome = gate<string>()
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.get('/', async (request, reply) => {
        const writing = add(request.db, 'x')
        reply.send('sent')
        await writing.then(
          () => outcome.open('written'),
          (error) => outcome.open(error.code),
        )
      })
    })
    const { statusCode } = await app.inject('/')
    const wrote = await outcome.opened
    await holds(t, database, statusCode === 200 && wrote === 'written' ? ['x'] : [])
    t.ok(['written', 'FST_REQUEST_DB_SESSION_ENDED'].includes(wrote), wrote)
  },
)

inBothModes(
  database,
  'a session whose first statement waits for a connection while the answer is sent',
  async (t, commitOn) => {
    const goOn = gate()
    let outcome: Promise<string> | undefined
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.get('/', async (request) => {
        outcome = add(request.db, 'x').then(
          () => 'written',
          (error) => error.code,
        )
        return 'ok'
      })
    })
    const holder = app.db.session(async (db) => {
      await add(db, 'held')
      await goOn.opened
    })
    const answer = app.inject('/')
    setImmediate(goOn.open)
    const { statusCode } = await answer
    await holder
    t.equal(statusCode, 200)
    const wrote = (await outcome) === 'written'
    await holds(t, database, wrote ? ['held', 'x'] : ['held'])
  },
)
