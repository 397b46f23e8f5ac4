import type { FastifyInstance } from 'fastify'
import requestDb from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { handmade } from '../support/handmade.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Where and when the plugin is registered, and which routes know of it. */
const database = await createDatabase(t, { sql: NOTES })

function routes(app: FastifyInstance, prefix = ''): void {
  app.route<{ Params: { end: string } }>({
    method: ['GET', 'POST'],
    url: `${prefix}/:end`,
    handler: async (request, reply) => {
      await add(request.db, `${request.method} ${request.params.end}`)
      if (request.params.end === 'throw') throw new Error('mine')
      if (request.params.end === 'bad') reply.code(422)
      return { ok: true }
    },
  })
}

const orders: Record<string, (app: FastifyInstance, options: Parameters<typeof requestDb>[1]) => unknown> = {
  'awaited before the routes': async (app, options) => {
    await app.register(requestDb, options)
    routes(app)
  },
  'not awaited before the routes': (app, options) => {
    app.register(requestDb, options)
    routes(app)
  },
  'after the routes': (app, options) => {
    routes(app)
    app.register(requestDb, options)
  },
  'beside a plugin with the routes': (app, options) => {
    app.register(requestDb, options)
    app.register(async (scope) => routes(scope))
  },
  'inside a child scope, awaited': (app, options) =>
    app.register(async (scope) => {
      await scope.register(requestDb, options)
      routes(scope)
    }),
  'inside a child scope, not awaited': (app, options) =>
    app.register(async (scope) => {
      scope.register(requestDb, options)
      routes(scope)
    }),
}

for (const [order, register] of Object.entries(orders)) {
  inBothModes(database, `registered ${order}`, async (t, commitOn) => {
    const { app, connectionString, ready } = handmade(t, database)
    let scope = app
    app.addHook('onRegister', (instance) => {
      scope = instance
    })
    await register(app, { connectionString, commitOn })
    await ready(() => (app.hasDecorator('db') ? app : scope))
    const client = await openHttp(t, app)
    const expected: string[] = []
    for (const method of ['GET', 'HEAD', 'POST'] as const) {
      for (const [end, status] of [
        ['good', 200],
        ['throw', 500],
        ['bad', 422],
      ] as const) {
        const body = method === 'POST' ? { body: {} } : {}
        t.equal((await app.inject({ method, url: `/${end}`, ...body })).statusCode, status)
        if (end === 'good') expected.push(`${method} ${end}`)
        await eventually(async () => (await notesIn(database)).length === expected.length)
        t.equal((await client.send(method, `/${end}`, body).response()).status, status)
        if (end === 'good') expected.push(`${method} ${end}`)
        if (commitOn === 'onSend') t.strictSame(await notesIn(database), expected)
        else await eventually(async () => (await notesIn(database)).length === expected.length)
      }
    }
    await holds(t, database, expected)
  })
}

for (const how of ['awaited', 'not awaited'] as const) {
  inBothModes(database, `a client that leaves, registered and ${how}`, async (t, commitOn) => {
    const never = gate()
    const { app, connectionString, ready } = handmade(t, database)
    if (how === 'awaited') await app.register(requestDb, { connectionString, commitOn })
    else app.register(requestDb, { connectionString, commitOn })
    app.post('/', async (request) => {
      await add(request.db, 'x')
      await never.opened
      return 'ok'
    })
    await ready()
    const client = await openHttp(t, app)
    client.send('POST', '/', { body: {} })
    await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
    client.destroy()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    never.open()
    await holds(t, database, [])
  })
}

inBothModes(database, 'an onSend hook that fails on a route declared without awaiting', async (t, commitOn) => {
  const { app, connectionString, ready } = handmade(t, database)
  app.register(requestDb, { connectionString, commitOn })
  app.post('/', { onSend: () => Promise.reject(new Error('mine')) }, async (request) => {
    await add(request.db, 'x')
    return 'ok'
  })
  await ready()
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
  // Such a route bears no mark, so its commit has to come before its own hooks: await register, and it does not.
  await holds(t, database, commitOn === 'onSend' ? ['x'] : [])
})

inBothModes(database, 'a handler for what is not found has a session like others', async (t, commitOn) => {
  const { app, connectionString, ready } = handmade(t, database)
  await app.register(requestDb, { connectionString, commitOn })
  app.setNotFoundHandler(async (request, reply) => {
    await add(request.db, request.url)
    return reply.code(request.url === '/found' ? 200 : 404).send('handled')
  })
  await ready()
  const client = await openHttp(t, app)
  for (const ask of [
    async (url: string) => (await app.inject(url)).statusCode,
    async (url: string) => (await client.send('GET', url).response()).status,
  ]) {
    t.equal(await ask('/lost'), 404)
    t.equal(await ask('/found'), 200)
    if (commitOn === 'onSend') t.equal((await notesIn(database)).at(-1), '/found')
  }
  await holds(t, database, ['/found', '/found'])
})

for (const where of ['the root', 'a child scope'] as const) {
  inBothModes(database, `reply.callNotFound() with the plugin in ${where}`, async (t, commitOn) => {
    const { app, connectionString, ready } = handmade(t, database)
    let scope = app
    const declare = async (instance: FastifyInstance) => {
      scope = instance
      await instance.register(requestDb, { connectionString, commitOn })
      instance.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request, reply) => {
          await add(request.db, 'x')
          return reply.callNotFound()
        },
      })
    }
    if (where === 'the root') await declare(app)
    else app.register(declare)
    await ready(() => scope)
    const client = await openHttp(t, app)
    for (const method of ['GET', 'POST'] as const) {
      t.equal((await client.send(method, '/', method === 'POST' ? { body: {} } : {}).response()).status, 404)
      await holds(t, database, [])
      t.equal((await app.inject({ method, url: '/' })).statusCode, 404)
      await holds(t, database, [])
    }
    t.match(scope.db.snapshot().totals, { opened: 1, rollbacks: 4 })
  })

  inBothModes(database, `reply.callNotFound() answered with 200, with the plugin in ${where}`, async (t, commitOn) => {
    const { app, connectionString, ready } = handmade(t, database)
    let scope = app
    const declare = async (instance: FastifyInstance) => {
      scope = instance
      await instance.register(requestDb, { connectionString, commitOn })
      instance.get('/', async (request, reply) => {
        await add(request.db, 'x')
        return reply.callNotFound()
      })
    }
    app.setNotFoundHandler((_request, reply) => reply.code(200).send('the front page'))
    if (where === 'the root') await declare(app)
    else app.register(declare)
    await ready(() => scope)
    const client = await openHttp(t, app)
    t.match(await client.send('GET', '/').response(), { status: 200, body: 'the front page' })
    await holds(t, database, ['x'])
  })
}

inBothModes(database, 'a hook of onRequest that was added before the plugin comes too early', async (t, commitOn) => {
  const { app, connectionString, ready } = handmade(t, database)
  app.addHook('onRequest', async (request) => {
    await add(request.db, 'early')
  })
  app.register(requestDb, { connectionString, commitOn })
  app.get('/', async () => 'ok')
  await ready()
  const answer = await app.inject('/')
  t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_SESSION_ENDED.*register that before hooks that use it/ })
  await holds(t, database, [])
  t.equal(app.db.snapshot().totals.checkouts, 0)
})
