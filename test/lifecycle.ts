import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { openHttp } from './support/http-client.ts'
import { holds, inBothModes } from './support/modes.ts'
import { add, notesIn } from './support/notebook.ts'
import { NOTES } from './support/schema.ts'
import { t } from './support/test.ts'

/*
 * The truth table: how the request ended, and what the database then holds. Every handler writes one row and ends in its
 * own way. Each ending is tried with GET and POST, through inject and on a kept-alive socket, in both commit modes.
 * What needs a client that leaves, a stream, HTTP/2 or a second connection is in the files of test/lifecycle.
 */
interface Ending {
  readonly name: string
  readonly status: number
  readonly keeps: boolean
  /** What the handler does after its insert. */
  readonly end: (request: FastifyRequest, reply: FastifyReply) => unknown
  /** Hooks, error handlers and the like, declared before the route. */
  readonly setup?: (app: FastifyInstance) => void
  readonly route?: object
  readonly body?: string | RegExp
}

const database = await createDatabase(t, { sql: NOTES })

const failing = async () => {
  throw new Error('mine')
}
const ok = async () => ({ ok: true })

const endings: Ending[] = [
  { name: 'a value is returned', status: 200, keeps: true, end: ok, body: '{"ok":true}' },
  { name: 'a string is returned', status: 200, keeps: true, end: async () => 'text', body: 'text' },
  { name: 'a buffer is returned', status: 200, keeps: true, end: async () => Buffer.from('bytes'), body: 'bytes' },
  { name: 'null is returned', status: 200, keeps: true, end: async () => null, body: 'null' },
  { name: 'undefined is returned', status: 200, keeps: true, end: async () => undefined, body: '' },
  { name: 'reply.send is returned', status: 201, keeps: true, end: (_, reply) => reply.code(201).send('sent') },
  {
    name: 'reply.send is called and nothing returned',
    status: 200,
    keeps: true,
    end: async (_, reply) => void reply.send('sent'),
    body: 'sent',
  },
  {
    name: 'reply.send is called later, and reply returned',
    status: 200,
    keeps: true,
    end: async (_, reply) => {
      setImmediate(() => reply.send('later'))
      return reply
    },
    body: 'later',
  },
  { name: 'a redirect', status: 302, keeps: true, end: (_, reply) => reply.redirect('/elsewhere') },
  { name: '204 without a body', status: 204, keeps: true, end: (_, reply) => reply.code(204).send() },
  { name: '304 without a body', status: 304, keeps: true, end: (_, reply) => reply.code(304).send() },
  { name: '399, the last of the good ones', status: 399, keeps: true, end: (_, reply) => reply.code(399).send() },
  { name: '400 is sent', status: 400, keeps: false, end: (_, reply) => reply.code(400).send({ no: true }) },
  { name: '404 is sent', status: 404, keeps: false, end: (_, reply) => reply.code(404).send({ no: true }) },
  { name: '500 is sent', status: 500, keeps: false, end: (_, reply) => reply.code(500).send({ no: true }) },
  { name: 'the handler throws', status: 500, keeps: false, end: failing, body: /mine/ },
  { name: 'the handler throws null', status: 500, keeps: false, end: () => Promise.reject(null) },
  { name: 'the handler throws undefined', status: 500, keeps: false, end: () => Promise.reject(undefined) },
  { name: 'the handler throws a string', status: 500, keeps: false, end: () => Promise.reject('mine') },
  {
    name: 'the handler throws an error that bears status 200',
    status: 500,
    keeps: false,
    end: () => Promise.reject(Object.assign(new Error('mine'), { statusCode: 200 })),
  },
  {
    name: 'the handler throws an error that bears status 409',
    status: 409,
    keeps: false,
    end: () => Promise.reject(Object.assign(new Error('mine'), { statusCode: 409 })),
  },
  {
    name: 'an error is sent',
    status: 500,
    keeps: false,
    end: (_, reply) => reply.send(new Error('mine')),
    body: /mine/,
  },
  {
    name: 'an error is sent with status 201 set before',
    status: 500,
    keeps: false,
    end: (_, reply) => reply.code(201).send(new Error('mine')),
  },
  {
    name: 'an error handler of the app answers 200',
    status: 200,
    keeps: false,
    setup: (app) => app.setErrorHandler((_error, _request, reply) => reply.code(200).send('handled')),
    end: failing,
    body: 'handled',
  },
  {
    name: 'an asynchronous error handler of the route answers 200',
    status: 200,
    keeps: false,
    route: { errorHandler: async (_error: Error, _request: FastifyRequest, reply: FastifyReply) => reply.send('soon') },
    end: failing,
    body: 'soon',
  },
  {
    name: 'the error handler throws as well',
    status: 500,
    keeps: false,
    setup: (app) => {
      app.setErrorHandler(() => {
        throw new Error('worse')
      })
    },
    end: failing,
    body: /worse/,
  },
  {
    name: 'the error handler uses the session of the failed request',
    status: 500,
    keeps: false,
    setup: (app) => {
      app.setErrorHandler(async (_error, request) => {
        await add(request.db, 'audit')
        return 'kept'
      })
    },
    end: failing,
    body: /FST_REQUEST_DB_SESSION_ENDED/,
  },
  {
    name: 'the serializer throws',
    status: 500,
    keeps: false,
    end: (_, reply) =>
      reply
        .serializer(() => {
          throw new Error('mine')
        })
        .send({ ok: true }),
    body: /mine/,
  },
  {
    name: 'the response does not fit its schema',
    status: 500,
    keeps: false,
    route: {
      schema: { response: { 200: { type: 'object', properties: { n: { type: 'number' } }, required: ['n'] } } },
    },
    end: ok,
    body: /is required/,
  },
  {
    name: 'preSerialization throws',
    status: 500,
    keeps: false,
    setup: (app) => app.addHook('preSerialization', failing),
    end: ok,
    body: /mine/,
  },
  {
    name: 'the payload is of a kind that cannot be sent',
    status: 500,
    keeps: false,
    end: (_, reply) => reply.type('text/plain').send({ ok: true }),
    body: /FST_ERR_REP_INVALID_PAYLOAD_TYPE/,
  },
  {
    name: 'a header holds what no header may hold',
    status: 500,
    keeps: false,
    end: (_, reply) => reply.header('content-disposition', 'attachment; filename="\u2013.pdf"').send('x'),
    body: /Invalid character in header/,
  },
  {
    name: 'an error is sent and nothing returned',
    status: 500,
    keeps: false,
    end: async (_, reply) => void reply.send(new Error('mine')),
    body: /mine/,
  },
]

for (const ending of endings) {
  inBothModes(database, `${ending.keeps ? 'kept' : 'rolled back'}: ${ending.name}`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      ending.setup?.(app)
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        ...ending.route,
        handler: async (request, reply) => {
          await add(request.db, `${request.method} by ${request.headers.by}`)
          return ending.end(request, reply)
        },
      })
    })
    const client = await openHttp(t, app)
    const expected: string[] = []
    for (const method of ['GET', 'POST'] as const) {
      const payload = method === 'POST' ? { body: { note: 'x' } } : {}
      const injected = await app.inject({ method, url: '/', headers: { by: 'inject' }, ...payload })
      check(injected.statusCode, injected.body)
      await checkRows(`${method} by inject`)
      const { status, body } = await client.send(method, '/', { headers: { by: 'socket' }, ...payload }).response()
      check(status, body)
      await checkRows(`${method} by socket`)
    }

    function check(status: number, body: string): void {
      t.equal(status, ending.status)
      if (typeof ending.body === 'string') t.equal(body, ending.body)
      else if (ending.body) t.match(body, ending.body)
    }

    async function checkRows(note: string): Promise<void> {
      if (ending.keeps) expected.push(note)
      // Before a good answer leaves, everything is done.
      if (ending.keeps && commitOn === 'onSend') {
        t.equal(app.db.snapshot().checkedOut, 0)
        t.strictSame(await notesIn(database), expected)
      }
      await holds(t, database, expected)
    }

    const { opened, checkouts, commits, rollbacks } = app.db.snapshot().totals
    t.match({ opened, checkouts, commits, rollbacks }, totals(ending), 'one connection served them all')
  })
}

function totals({ keeps }: Ending) {
  return { opened: 1, checkouts: 4, commits: keeps ? 4 : 0, rollbacks: keeps ? 0 : 4 }
}
