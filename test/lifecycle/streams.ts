import { Readable } from 'node:stream'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Answers that are read after onSend: their session ends with the last byte, or with the failure that cuts them short. */
const database = await createDatabase(t, { sql: NOTES })

const LINES = ['row 1\n', 'row 2\n', 'row 3\n']
const BODY = LINES.join('')

/** Rows that are read from the session while the body is being sent. */
async function* rows(db: Session, count = 3): AsyncGenerator<string> {
  const query = sql<{ n: number }>`(select n from generate_series(1, ${count}::int) n)`
  for await (const { n } of db.selectFrom(query.as('series')).select('n').stream(1)) yield `row ${n}\n`
}

function toWeb(source: AsyncIterable<string>): ReadableStream<Uint8Array> {
  return Readable.toWeb(Readable.from(source)).pipeThrough(new TextEncoderStream()) as ReadableStream<Uint8Array>
}

type Send = (source: AsyncIterable<string>, reply: FastifyReply) => unknown

const kinds: Record<string, Send> = {
  'a node stream': (source) => Readable.from(source, { objectMode: true }),
  'a node stream handed to reply.send': (source, reply) => reply.send(Readable.from(source)),
  'a web stream': (source) => toWeb(source),
  'a web Response with a stream': (source) => new Response(toWeb(source)),
}

for (const [kind, send] of Object.entries(kinds)) {
  inBothModes(database, `${kind} is sent whole, then its writes are committed`, async (t, commitOn) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { commitOn, connectionString: proxy.connectionString }
    const app = await buildApp(t, database, options, (app) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request, reply) => {
          await add(request.db, request.method)
          return send(rows(request.db), reply)
        },
      })
    })
    t.equal((await app.inject('/')).body, BODY)
    await holds(t, database, ['GET'])
    const client = await openHttp(t, app)
    t.equal((await client.send('POST', '/', { body: {} }).response()).body, BODY)
    await holds(t, database, ['GET', 'POST'])
    t.strictSame(proxy.statements().at(-1), ['COMMIT'], 'COMMIT comes after the last row')
  })

  inBothModes(database, `${kind} with an error status is rolled back`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.get('/', async (request, reply) => {
        await add(request.db, 'x')
        reply.code(500)
        const payload = send(rows(request.db), reply)
        return payload instanceof Response ? new Response(payload.body, { status: 500 }) : payload
      })
    })
    const answer = await app.inject('/')
    t.match(answer, { statusCode: 500, body: BODY })
    await holds(t, database, [])
  })

  inBothModes(database, `${kind} that fails before its first byte is a 500 and rolled back`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.get('/', async (request, reply) => {
        await add(request.db, 'x')
        return send(failsAfter(request.db, 0), reply)
      })
    })
    t.match(await app.inject('/'), { statusCode: 500, body: /mine/ })
    await holds(t, database, [])
    const client = await openHttp(t, app)
    t.match(await client.send('GET', '/').response(), { status: 500, body: /mine/ })
    await holds(t, database, [])
  })

  inBothModes(database, `${kind} that fails midway is cut off and rolled back`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request, reply) => {
          await add(request.db, 'x')
          return send(failsAfter(request.db, 10), reply)
        },
      })
    })
    for (const method of ['GET', 'POST']) {
      const client = await openHttp(t, app)
      client.send(method, '/', method === 'POST' ? { body: {} } : {})
      await t.rejects(client.response(), /ended before the response was whole/)
      t.match(client.received, /row 1/)
      await holds(t, database, [])
    }
    t.equal(app.db.snapshot().totals.opened, 1, 'the connection lives on')
  })

  inBothModes(
    database,
    `${kind} whose client leaves is closed and rolled back within a second`,
    async (t, commitOn) => {
      const closed = { GET: gate(), POST: gate() }
      const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
        app.route({
          method: ['GET', 'POST'],
          url: '/',
          handler: async (request, reply) => {
            await add(request.db, 'x')
            return send(endless(request, closed[request.method as 'GET' | 'POST'].open), reply)
          },
        })
      })
      for (const method of ['GET', 'POST'] as const) {
        const client = await openHttp(t, app)
        client.send(method, '/', method === 'POST' ? { body: {} } : {})
        await client.receives('row')
        client.destroy()
        await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
        await closed[method].opened
        await holds(t, database, [])
      }
      t.equal(app.db.snapshot().totals.opened, 1, 'the connection lives on')
    },
  )
}

async function* failsAfter(db: Session, count: number): AsyncGenerator<string> {
  if (count > 0) yield* rows(db, count)
  throw new Error('mine')
}

async function* endless(request: FastifyRequest, closed: () => void): AsyncGenerator<string> {
  try {
    yield* rows(request.db, 1_000_000)
  } finally {
    closed()
  }
}

inBothModes(database, 'a stream may be read from before it is sent', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      const source = rows(request.db)
      const first = await source.next()
      return Readable.from(
        (async function* () {
          yield `${first.value}`
          yield* source
        })(),
      )
    })
  })
  t.equal((await app.inject('/')).body, BODY)
  await holds(t, database, ['x'])
})

inBothModes(database, 'a stream that writes keeps all of it, or nothing', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get<{ Params: { fails: string } }>('/:fails', async (request) =>
      Readable.from(
        (async function* () {
          for (const note of ['1', '2', '3']) {
            await add(request.db, note)
            yield note
          }
          if (request.params.fails === 'yes') throw new Error('mine')
        })(),
      ),
    )
  })
  t.equal((await app.inject('/no')).body, '123', 'the session may be used for the first time while the body is sent')
  await holds(t, database, ['1', '2', '3'])
  await t.rejects(app.inject('/yes'))
  await holds(t, database, ['1', '2', '3'])
})

inBothModes(database, 'a web Response without a body is judged by its own status', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get<{ Params: { status: string } }>('/:status', async (request) => {
      await add(request.db, request.params.status)
      return new Response(null, { status: Number(request.params.status) })
    })
  })
  for (const status of [200, 204, 302, 400, 500]) t.equal((await app.inject(`/${status}`)).statusCode, status)
  await holds(t, database, ['200', '204', '302'])
})

inBothModes(database, 'a web Response with a text is judged by its own status', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get<{ Params: { status: string } }>('/:status', async (request) => {
      await add(request.db, request.params.status)
      return new Response('text', { status: Number(request.params.status) })
    })
  })
  for (const status of [200, 299, 404, 500]) {
    t.match(await app.inject(`/${status}`), { statusCode: status, body: 'text' })
  }
  await holds(t, database, ['200', '299'])
})

inBothModes(database, 'a web Response that was read before is a 500 and rolled back', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      const response = new Response('text')
      await response.text()
      return response
    })
  })
  t.equal((await app.inject('/')).statusCode, 500)
  await holds(t, database, [])
})

inBothModes(database, 'a hook that makes a stream of plain JSON does not postpone the commit', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', async (_request, _reply, payload) => Readable.from([`${payload}`]))
    app.get('/', async (request) => {
      await add(request.db, 'x')
      return { ok: true }
    })
  })
  t.equal((await app.inject('/')).body, '{"ok":true}')
  if (commitOn === 'onSend') t.strictSame(await notesIn(database), ['x'])
  await holds(t, database, ['x'])
})

inBothModes(database, 'a hook that replaces a stream by a text does not lose the commit', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', async (_request, _reply, payload) => {
      let text = ''
      for await (const piece of payload as Readable) text += piece
      return text
    })
    app.get('/', async (request) => {
      await add(request.db, 'x')
      return Readable.from(rows(request.db))
    })
  })
  t.equal((await app.inject('/')).body, BODY)
  await holds(t, database, ['x'])
})

inBothModes(database, 'HEAD drains the stream of its GET route and ends the session', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, request.method)
      return Readable.from(rows(request.db))
    })
  })
  t.equal((await app.inject({ method: 'HEAD', url: '/' })).statusCode, 200)
  await holds(t, database, ['HEAD'])
  const client = await openHttp(t, app)
  t.equal((await client.send('HEAD', '/').response()).status, 200)
  await holds(t, database, ['HEAD', 'HEAD'])
})

inBothModes(database, 'a 204 that is given a stream ends the session', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      return reply.code(204).send(Readable.from(rows(request.db)))
    })
  })
  t.equal((await app.inject('/')).statusCode, 204)
  await holds(t, database, ['x'])
})

inBothModes(database, 'a slow reader is cut off at maxSessionMillis, and others are served', async (t, commitOn) => {
  const options = { commitOn, pool: { size: 2 }, maxSessionMillis: 300 }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/slow', async (request) => {
      await add(request.db, 'slow')
      return Readable.from(big(request.db))
    })
    app.get('/', async (request) => (await sql<{ n: number }>`select 1 n`.execute(request.db)).rows)
  })
  const reader = await openHttp(t, app)
  reader.send('GET', '/slow')
  await reader.receives('HTTP/1.1 200')
  reader.pause()
  let served = 0
  await eventually(
    async () => {
      if ((await app.inject('/')).statusCode === 200) served++
      return app.db.snapshot().totals.rollbacks === 1
    },
    { withinMillis: 1500 },
  )
  t.ok(served > 0)
  await holds(t, database, [])
  reader.resume()
  await eventually(() => reader.closed)
  t.notMatch(reader.received.slice(-7), '0\r\n\r\n', 'the body is not whole')
})

async function* big(db: Session): AsyncGenerator<string> {
  const query = sql<{ text: string }>`(select repeat('x', 10000) as text from generate_series(1, 100000))`
  for await (const { text } of db.selectFrom(query.as('series')).select('text').stream(10)) yield text
}
