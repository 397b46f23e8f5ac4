import { EventEmitter, on, once } from 'node:events'
import { PassThrough, Readable, Transform } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { currentSession } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { openHttp2 } from '../support/http2-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* currentSession() is request.db of the request that the running code belongs to. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const followed = (t: Test, routes: (app: FastifyInstance) => unknown, options = {}) =>
  buildApp(t, database, { asyncContext: true, ...options }, routes)

/** A repository that is handed nothing. */
const addNote = (note: string) => add(currentSession(), note)

inBothModes(
  database,
  'a repository finds the session of its request, and its rows have the fate of the request',
  async (t, commitOn) => {
    const app = await followed(
      t,
      (app) => {
        app.post('/kept', async () => {
          await addNote('kept')
          return 'ok'
        })
        app.post('/failed', async () => {
          await addNote('lost')
          throw new Error('no')
        })
      },
      { commitOn },
    )
    t.equal((await app.inject({ method: 'POST', url: '/kept' })).statusCode, 200)
    t.equal((await app.inject({ method: 'POST', url: '/failed' })).statusCode, 500)
    await holds(t, database, ['kept'])
  },
)

const later = new EventEmitter()

/** Ways to get from a handler to a repository. Each resolves with what currentSession() is there. */
const WAYS: Record<string, () => Promise<unknown>> = {
  await: async () => {
    await null
    return currentSession()
  },
  'a timer': () => new Promise((resolve) => setTimeout(() => resolve(currentSession()), 1)),
  setImmediate: () => new Promise((resolve) => setImmediate(() => resolve(currentSession()))),
  nextTick: () => new Promise((resolve) => process.nextTick(() => resolve(currentSession()))),
  'a statement': async () => {
    await pidOf(currentSession())
    return currentSession()
  },
  'a nested transaction': () =>
    currentSession()
      .transaction()
      .execute(async () => currentSession()),
  'the rows of a stream': async () => {
    for await (const _ of currentSession()
      .selectNoFrom((eb) => eb.val(1).as('n'))
      .stream())
      return currentSession()
    return undefined
  },
  'the raw client': () => currentSession().withClient(async () => currentSession()),
  'an emitter of its own': async () => {
    const emitter = new EventEmitter()
    const heard = once(emitter, 'done')
    emitter.once('x', () => emitter.emit('done', currentSession()))
    setImmediate(() => emitter.emit('x'))
    return (await heard)[0]
  },
  'events as an iterator': async () => {
    setTimeout(() => later.emit('ping'), 1)
    for await (const _ of on(later, 'ping')) return currentSession()
    return undefined
  },
  'streams through a pipeline': async () => {
    let found: unknown
    const transform = new Transform({
      transform(chunk, _encoding, done) {
        found = currentSession()
        done(null, chunk)
      },
    })
    await pipeline(Readable.from(['a', 'b']), transform, new PassThrough().resume())
    return found
  },
}

for (const [way, go] of Object.entries(WAYS)) {
  test(`across ${way}, with others side by side`, async (t) => {
    const app = await followed(t, (app) => {
      app.get('/', async (request) => ({ same: (await go()) === request.db }))
    })
    const answers = await Promise.all(Array.from({ length: 8 }, () => app.inject('/')))
    for (const answer of answers) t.strictSame(answer.json(), { same: true })
  })
}

const HOOKS = ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'preSerialization', 'onSend'] as const

test('in every hook, over a socket, with a body that is parsed, and with one that comes in pieces', async (t) => {
  const seen: string[] = []
  const app = await followed(t, (app) => {
    for (const hook of HOOKS) {
      app.addHook(hook as 'onRequest', async (request) => {
        if (currentSession() === request.db) seen.push(hook)
      })
    }
    app.addContentTypeParser('text/csv', { parseAs: 'string' }, async (request: { db: unknown }, body: string) => {
      await turn()
      if (currentSession() === request.db) seen.push('parser')
      return body
    })
    app.post('/', async (request) => {
      await addNote('x')
      if (currentSession() === request.db) seen.push('handler')
      return { ok: true }
    })
  })
  const client = await openHttp(t, app)
  for (const round of [1, 2]) {
    seen.length = 0
    client.send('POST', '/', { body: 'a,b', headers: { 'content-type': 'text/csv' } })
    t.equal((await client.response()).status, 200)
    t.strictSame(
      seen,
      [...HOOKS.slice(0, 2), 'parser', ...HOOKS.slice(2, 4), 'handler', ...HOOKS.slice(4)],
      `round ${round}`,
    )
  }
})

test('listeners of the request body and of the response find it too', async (t) => {
  const seen: [string, boolean][] = []
  const app = await followed(t, (app) => {
    app.addContentTypeParser('application/octet-stream', (_request, payload, done) => done(null, payload))
    app.post('/', async (request, reply) => {
      const see = (what: string) => seen.push([what, currentSession() === request.db])
      reply.raw.once('pipe', () => see('pipe'))
      const body = request.body as Readable
      body.on('data', () => see('data'))
      await new Promise<void>((resolve) => body.once('end', () => resolve(void see('end'))))
      await addNote('x')
      return Readable.from(['a'])
    })
  })
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: 'bytes', headers: { 'content-type': 'application/octet-stream' } })
  t.equal((await client.response()).status, 200)
  t.strictSame(seen, [
    ['data', true],
    ['end', true],
    ['pipe', true],
  ])
})

test('requests side by side on one connection, pipelined and over HTTP/2, each find their own', async (t) => {
  const routes = (app: FastifyInstance) => {
    app.post<{ Body: { note: string } }>('/', async (request) => {
      await turn()
      await addNote(request.body.note)
      await turn()
      return { note: request.body.note, same: currentSession() === request.db }
    })
  }
  const client = await openHttp(t, await followed(t, routes))
  for (const note of ['a', 'b', 'c']) client.send('POST', '/', { body: { note } })
  for (const note of ['a', 'b', 'c']) t.strictSame(JSON.parse((await client.response()).body), { note, same: true })
  const app = await buildApp(t, database, { asyncContext: true }, routes, { http2: true })
  const session = await openHttp2(t, app)
  const streams = ['d', 'e', 'f'].map((note) => session.send('POST', '/', { body: { note } }))
  for (const [index, stream] of streams.entries()) {
    const answer = await stream.response()
    t.strictSame(JSON.parse(answer.body), { note: ['d', 'e', 'f'][index], same: true })
  }
  t.strictSame((await notesIn(database)).sort(), ['a', 'b', 'c', 'd', 'e', 'f'])
})

test('the first request opens the connection, and others use it: nobody finds the session of the first', async (t) => {
  const firstHolds = gate()
  const goOn = gate()
  const app = await followed(
    t,
    (app) => {
      app.get('/first', async (request) => {
        await addNote('first')
        firstHolds.open()
        await goOn.opened
        return { same: currentSession() === request.db }
      })
      app.get('/other', async (request) => {
        await addNote('other')
        const found: boolean[] = [currentSession() === request.db]
        await request.db.withClient(async (client) => {
          // What a socket of the pool says is said to nobody's request.
          client.once('notice', () => t.throws(() => currentSession(), { code: 'FST_REQUEST_DB_NO_SESSION' }))
          await client.query("do $$ begin raise notice 'x'; end $$")
          found.push(currentSession() === request.db)
        })
        request.db.afterCommit(() => {
          afterCommit.push(currentSession() === request.db)
        })
        await request.db.commit()
        return { found }
      })
    },
    { pool: { size: 2 } },
  )
  const afterCommit: boolean[] = []
  await app.inject('/other')
  const first = app.inject('/first')
  await firstHolds.opened
  for (let round = 0; round < 3; round++) {
    const { found } = (await app.inject('/other')).json()
    t.ok(found[0])
    t.ok(found.at(-1))
  }
  goOn.open()
  t.strictSame((await first).json(), { same: true })
  t.strictSame(afterCommit, [true, true, true, true], 'a callback runs in the context it was registered in')
})

test('outside of a request there is none, and the error says what to do', async (t) => {
  const app = await followed(t, () => {})
  await app.inject('/nothing')
  t.throws(() => currentSession(), { code: 'FST_REQUEST_DB_NO_SESSION', message: /call it inside a request/ })
  t.throws(() => currentSession('other'), { code: 'FST_REQUEST_DB_NO_SESSION', message: /asyncContext: true/ })
})

test('without asyncContext there is none, and the error says so', async (t) => {
  const app = await buildApp(t, database, { decorator: 'plain' }, (app) => {
    app.get('/', async () => currentSession('plain'))
  })
  const answer = await app.inject('/')
  t.equal(answer.statusCode, 500)
  t.match(answer.json(), { code: 'FST_REQUEST_DB_NO_SESSION', message: /register the plugin with asyncContext: true/ })
})

inBothModes(database, 'never a session that has ended', async (t, commitOn) => {
  const errors: unknown[] = []
  const goOn = gate()
  const done = gate()
  const app = await followed(
    t,
    (app) => {
      app.get('/', async () => {
        await addNote('x')
        void goOn.opened.then(() => {
          try {
            currentSession()
          } catch (error) {
            errors.push((error as { code: string }).code)
          }
          done.open()
        })
        return 'ok'
      })
    },
    { commitOn },
  )
  t.equal((await app.inject('/')).statusCode, 200)
  await holds(t, database, ['x'])
  goOn.open()
  await done.opened
  t.strictSame(errors, ['FST_REQUEST_DB_SESSION_ENDED'])
})

test('an injected request has its own, and its parent has its own again behind it', async (t) => {
  const app = await followed(t, (app) => {
    app.get('/inner', async (request) => ({ same: currentSession() === request.db }))
    app.get('/outer', async (request) => {
      await addNote('outer')
      const inner = (await app.inject('/inner')).json()
      return { inner, same: currentSession() === request.db }
    })
  })
  t.strictSame((await app.inject('/outer')).json(), { inner: { same: true }, same: true })
})

test('a session inside a request is the current one inside, and the request has its own again behind it', async (t) => {
  const app = await followed(t, (app) => {
    app.get('/', async (request) => {
      await request.db.commit()
      const inside = await app.db.session(async (db) => {
        await addNote('inside')
        return currentSession() === db
      })
      return { inside, same: currentSession() === request.db }
    })
  })
  t.strictSame((await app.inject('/')).json(), { inside: true, same: true })
  t.strictSame(await notesIn(database), ['inside'])
})

test('two registrations: each by its name', async (t) => {
  const other = await createDatabase(t, { sql: NOTES })
  const { default: requestDb } = await import('../../lib/index.ts')
  const app = await followed(t, async (app) => {
    const { connectionString } = other
    await app.register(requestDb, { connectionString, decorator: 'other', asyncContext: true, capacityCheck: false })
    app.get('/', async (request) => {
      const both = request as unknown as { db: unknown; other: unknown }
      return { db: currentSession() === both.db, other: currentSession('other') === both.other }
    })
  })
  t.strictSame((await app.inject('/')).json(), { db: true, other: true })
})

test('a retried handler finds the session of its attempt', async (t) => {
  let runs = 0
  const app = await followed(t, (app) => {
    app.get('/', { config: { db: { retry: {} } } }, async (request) => {
      await addNote(`run ${++runs}`)
      if (runs === 1) throw Object.assign(new Error('again'), { code: '40001' })
      return { same: currentSession() === request.db }
    })
  })
  t.strictSame((await app.inject('/')).json(), { same: true })
  t.strictSame(await notesIn(database), ['run 2'])
})
