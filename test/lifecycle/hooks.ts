import type { FastifyInstance, FastifyRequest } from 'fastify'
import { sql } from 'kysely'
import requestDb, { type RequestDbOptions, type Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { handmade } from '../support/handmade.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* The app's own hooks beside the plugin's: what they may do with the session, and what their failure does to it. */
const database = await createDatabase(t, { sql: NOTES })

/** A hook's result may replace the answer, so this has none. */
async function write(db: Session, note: string): Promise<void> {
  await add(db, note)
}

const fails = async () => {
  throw new Error('mine')
}
const writing = (app: FastifyInstance, options: object = {}) =>
  app.post('/', options, async (request) => {
    await write(request.db, 'x')
    return 'ok'
  })

/** Ways to have an onSend hook of the app run: before ours, after ours, and on the route. */
const places: Record<string, (app: FastifyInstance, options: RequestDbOptions) => void> = {
  'before the plugin': (app, options) => {
    app.addHook('onSend', fails)
    app.register(requestDb, options).after(() => writing(app))
  },
  'after the plugin': (app, options) => {
    app.register(requestDb, options)
    app.after(() => {
      app.addHook('onSend', fails)
      writing(app)
    })
  },
  'on the route': (app, options) => {
    app.register(requestDb, options).after(() => writing(app, { onSend: fails }))
  },
  'on the route, in a list': (app, options) => {
    app.register(requestDb, options).after(() => writing(app, { onSend: [async () => {}, fails] }))
  },
}

for (const [place, declare] of Object.entries(places)) {
  inBothModes(database, `an onSend hook ${place} that throws rolls back`, async (t, commitOn) => {
    const { app, connectionString, ready } = handmade(t, database)
    declare(app, { connectionString, commitOn })
    await ready()
    t.match(await app.inject({ method: 'POST', url: '/' }), { statusCode: 500, body: /mine/ })
    await holds(t, database, [])
    const client = await openHttp(t, app)
    t.match(await client.send('POST', '/', { body: {} }).response(), { status: 500, body: /mine/ })
    await holds(t, database, [])
  })
}

inBothModes(database, 'an onSend hook that fails for the answer to its own failure too', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', fails)
    writing(app)
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
  await holds(t, database, [])
})

inBothModes(database, 'an onSend hook that fails after the handler has failed', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', fails)
    app.post('/', async (request) => {
      await write(request.db, 'x')
      throw new Error('first')
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
  await holds(t, database, [])
})

for (const level of ['app', 'route'] as const) {
  inBothModes(
    database,
    `an onSend hook of the ${level} that turns the answer into a 500 rolls back`,
    async (t, commitOn) => {
      const app = await buildApp(t, database, { commitOn }, (app) => {
        const hook = async (_request: unknown, reply: { code(status: number): unknown }) => void reply.code(500)
        if (level === 'app') app.addHook('onSend', hook)
        writing(app, level === 'route' ? { onSend: hook } : {})
      })
      t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
      await holds(t, database, [])
    },
  )

  inBothModes(database, `an onSend hook of the ${level} may write in the session`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      const hook = (request: FastifyRequest) => write(request.db, 'hook')
      if (level === 'app') app.addHook('onSend', hook)
      writing(app, level === 'route' ? { onSend: [hook] } : {})
    })
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
    if (commitOn === 'onSend') t.strictSame(await notesIn(database), ['x', 'hook'])
    await holds(t, database, ['x', 'hook'])
    t.match(app.db.snapshot().totals, { checkouts: 1, commits: 1 })
  })
}

inBothModes(
  database,
  'reply.send() without return, overtaken by the empty answer of the handler',
  async (t, commitOn) => {
    const overtaken = gate()
    let passes = 0
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.addHook('onSend', async () => {
        if (passes++ === 0) await overtaken.opened
        else overtaken.open()
      })
      app.get('/', async (request, reply) => {
        await write(request.db, 'x')
        reply.send('sent')
      })
    })
    const client = await openHttp(t, app)
    // Which of the two is Fastify's choice; that one of them fails then does not undo what the other has said.
    t.equal((await client.send('GET', '/').response()).status, 200)
    t.equal(passes, 2)
    await holds(t, database, ['x'])
  },
)

inBothModes(database, 'an onSend hook that is the first to write', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', (request) => write(request.db, 'hook'))
    app.get('/', async () => 'ok')
  })
  t.equal((await app.inject('/')).statusCode, 200)
  await holds(t, database, ['hook'])
})

inBothModes(database, 'hooks and handler share one session, one transaction, one connection', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const pids = new Set<number>()
  const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
    for (const hook of ['onRequest', 'preValidation', 'preHandler'] as const) {
      app.addHook(hook, async (request: FastifyRequest) => {
        const { rows } = await sql<{ pid: number }>`select pg_backend_pid() pid`.execute(request.db)
        pids.add(rows[0]?.pid ?? 0)
        await write(request.db, hook)
      })
    }
    app.addHook('preParsing', async (request) => write(request.db, 'preParsing'))
    app.addHook('preSerialization', async (request) => write(request.db, 'preSerialization'))
    app.post('/', async (request) => {
      await write(request.db, 'handler')
      return { ok: true }
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/', body: {} })).statusCode, 200)
  await holds(t, database, ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'handler', 'preSerialization'])
  t.equal(pids.size, 1)
  t.strictSame(
    proxy
      .statements()
      .flat()
      .filter((text) => /BEGIN|COMMIT/.test(text)),
    ['BEGIN', 'COMMIT'],
  )
})

inBothModes(database, 'a hook that answers in the place of the handler', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('preHandler', async (request, reply) => {
      await write(request.db, 'hook')
      return reply.code(request.url === '/bad' ? 403 : 200).send('hook')
    })
    app.get('/', async () => 'handler')
    app.get('/bad', async () => 'handler')
  })
  t.match(await app.inject('/'), { statusCode: 200, body: 'hook' })
  t.match(await app.inject('/bad'), { statusCode: 403, body: 'hook' })
  await holds(t, database, ['hook'])
})

inBothModes(
  database,
  'requests that fail before the handler, with a session opened in onRequest',
  async (t, commitOn) => {
    const app = await buildApp(
      t,
      database,
      { commitOn, pool: { size: 1 } },
      (app) => {
        app.addHook('onRequest', (request) => write(request.db, 'early'))
        const schema = {
          body: { type: 'object', required: ['note'] },
          querystring: { type: 'object', required: ['q'] },
        }
        app.post('/', { schema }, async () => 'ok')
      },
      { bodyLimit: 100 },
    )
    const json = { 'content-type': 'application/json' }
    const post = { method: 'POST', url: '/?q=1', headers: json } as const
    t.equal((await app.inject({ ...post, body: '{' })).statusCode, 400, 'bad JSON')
    t.equal((await app.inject({ ...post, body: '{}' })).statusCode, 400, 'invalid body')
    t.equal((await app.inject({ ...post, url: '/', body: '{"note":1}' })).statusCode, 400, 'invalid query')
    t.equal((await app.inject({ ...post, body: `"${'x'.repeat(200)}"` })).statusCode, 413, 'too large')
    t.equal(
      (await app.inject({ ...post, headers: { 'content-type': 'x/y' }, body: 'x' })).statusCode,
      415,
      'unknown type',
    )
    t.equal((await app.inject('/nowhere')).statusCode, 404, 'not found')
    const client = await openHttp(t, app)
    t.equal((await client.send('POST', '/?q=1', { body: '{' }).response()).status, 400, 'bad JSON over a socket')
    await holds(t, database, [])
    t.match(app.db.snapshot().totals, { opened: 1, checkouts: 7, rollbacks: 7, commits: 0 })
  },
)

inBothModes(database, 'a URL that cannot be decoded has no request, and needs no session', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onRequest', (request) => write(request.db, 'early'))
    app.get('/:name', async () => 'ok')
  })
  t.equal((await app.inject('/%zz')).statusCode, 400)
  await holds(t, database, [])
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

inBothModes(database, 'a hook of onResponse finds the session ended', async (t, commitOn) => {
  const refused = gate<string>()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onResponse', async (request) => {
      await write(request.db, 'late').catch((error) => refused.open(error.code))
    })
    app.get('/unused', async () => 'ok')
    writing(app)
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  await holds(t, database, ['x'])
  t.equal((await app.inject('/unused')).statusCode, 200)
  await holds(t, database, ['x'])
  t.equal(app.db.snapshot().totals.checkouts, 1)
})

inBothModes(database, 'a slow hook of onResponse before ours does not cost the commit', async (t, commitOn) => {
  const goOn = [gate(), gate()]
  const closed = [gate(), gate()]
  const { app, connectionString, ready } = handmade(t, database)
  let requests = 0
  app.addHook('onRequest', async (_request, reply) => {
    const { open } = closed[requests]!
    reply.raw.once('close', () => setImmediate(open))
  })
  app.addHook('onResponse', () => goOn[requests++]!.opened)
  await app.register(requestDb, { connectionString, commitOn })
  writing(app)
  await ready()
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  await closed[0]!.opened
  goOn[0]!.open()
  await holds(t, database, ['x'])
  const client = await openHttp(t, app)
  t.equal((await client.send('POST', '/', { body: {} }).response()).status, 200)
  await closed[1]!.opened
  goOn[1]!.open()
  await holds(t, database, ['x', 'x'])
})

inBothModes(database, 'a hook of onRequestAbort finds the session ended', async (t, commitOn) => {
  const never = gate()
  const refused = gate<string>()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onRequestAbort', async (request) => {
      await write(request.db, 'late').catch((error) => refused.open(error.code))
    })
    app.get('/', async (request) => {
      await write(request.db, 'x')
      await never.opened
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  client.destroy()
  t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  never.open()
  await holds(t, database, [])
})

inBothModes(database, 'a hook of onError finds the session ended, and may use another', async (t, commitOn) => {
  const refused = gate<string>()
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.addHook('onError', async (request) => {
      await write(request.db, 'late').catch((error) => refused.open(error.code))
      await app.db.session((db) => write(db, 'audit'))
    })
    app.post('/', async (request) => {
      await write(request.db, 'x')
      throw new Error('mine')
    })
  })
  t.match(await app.inject({ method: 'POST', url: '/' }), { statusCode: 500, body: /mine/ })
  t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  await holds(t, database, ['audit'])
})

inBothModes(database, 'an error handler keeps an audit row with a session of its own', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.setErrorHandler(async (error: Error, _request, reply) => {
      await app.db.session((db) => write(db, `audit: ${error.message}`))
      return reply.code(500).send('kept')
    })
    app.post('/', async (request) => {
      await write(request.db, 'x')
      throw new Error('mine')
    })
  })
  t.match(await app.inject({ method: 'POST', url: '/' }), { statusCode: 500, body: 'kept' })
  await holds(t, database, ['audit: mine'])
})
