import { createHook } from 'node:async_hooks'
import { Socket } from 'node:net'
import Fastify, { type FastifyInstance } from 'fastify'
import requestDb from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { handmade } from '../support/handmade.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* What a request costs that has no use for the database, and what it leaves behind: nothing. */
const database = await createDatabase(t, { sql: NOTES })

inBothModes(database, 'requests that never query open no connection and send nothing', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
    const schema = { body: { type: 'object', required: ['note'] } }
    app.post('/strict', { schema }, async () => 'ok')
    app.get('/looks', async (request) => request.db.state)
    app.get('/compiles', async (request) => request.db.selectFrom('notes').selectAll().compile().sql)
    app.get('/in-transaction', async (request) => String(request.db.inTransaction))
    app.get('/commits', async (request) => {
      await request.db.commit()
      await request.db.rollback()
      await request.db.flush()
      return 'ok'
    })
    app.get('/throws', async (request) => {
      throw new Error(request.db.state)
    })
    app.get('/plain', async () => 'ok')
  })
  const client = await openHttp(t, app)
  for (const [url, status] of [
    ['/plain', 200],
    ['/looks', 200],
    ['/compiles', 200],
    ['/in-transaction', 200],
    ['/commits', 200],
    ['/throws', 500],
    ['/nowhere', 404],
  ] as const) {
    t.equal((await app.inject(url)).statusCode, status, url)
    t.equal((await client.send('GET', url).response()).status, status, url)
  }
  t.equal((await app.inject({ method: 'POST', url: '/strict', body: {} })).statusCode, 400)
  t.equal((await app.inject({ method: 'POST', url: '/strict', body: '{' })).statusCode, 415)
  t.match(app.db.snapshot(), { open: 0, totals: { checkouts: 0, opened: 0, commits: 0, rollbacks: 0 } })
  t.strictSame(proxy.recordings, [], 'nobody ever connected')
})

test('callbacks that wait for a session that was not used are called', async (t) => {
  const called: string[] = []
  const app = await buildApp(t, database, {}, (app) => {
    app.get('/:end', async (request) => {
      request.db.afterCommit(() => called.push('commit'))
      request.db.afterRollback(() => called.push('rollback'))
      if (request.url === '/bad') throw new Error('mine')
      return 'ok'
    })
  })
  await app.inject('/good')
  await app.inject('/bad')
  t.strictSame(called, ['commit', 'rollback'])
})

inBothModes(database, 'a request that never queries adds no listener', async (t, commitOn) => {
  const counts: Record<string, number>[] = []
  const routes = (app: FastifyInstance) => {
    app.get('/', (request, reply) => {
      const { raw } = reply
      counts.push({
        close: raw.listenerCount('close'),
        error: raw.listenerCount('error'),
        finish: raw.listenerCount('finish'),
        requestClose: request.raw.listenerCount('close'),
        socketClose: request.raw.socket.listenerCount('close'),
      })
      reply.send('ok')
    })
  }
  // With a hook of onResponse, as Fastify listens for its own sake where there is one.
  const plain = Fastify()
  t.teardown(() => plain.close())
  plain.addHook('onResponse', (_request, _reply, done) => done())
  routes(plain)
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('preHandler', (request, _reply, done) => {
      request.db.selectFrom('notes').selectAll().compile()
      done()
    })
    routes(app)
  })
  for (const one of [plain, app]) await (await openHttp(t, one)).send('GET', '/').response()
  t.strictSame(counts[1], counts[0])
})

inBothModes(database, 'a request that never queries makes no promise', async (t, commitOn) => {
  const routes = (app: FastifyInstance) => {
    app.get('/', (_request, reply) => {
      reply.send({ ok: true })
    })
  }
  const plain = Fastify()
  t.teardown(() => plain.close())
  routes(plain)
  const app = await buildApp(t, database, { commitOn }, routes)
  await plain.ready()
  // The first of each compiles what Fastify compiles late.
  for (const one of [plain, app, plain, app]) await promisesOf(one)
  t.equal(await promisesOf(app), await promisesOf(plain))
})

function promisesOf(app: FastifyInstance): Promise<number> {
  let promises = 0
  const hook = createHook({
    init: (_id, type) => {
      if (type === 'PROMISE') promises++
    },
  })
  return new Promise((resolve, reject) => {
    hook.enable()
    app.inject('/', (error) => {
      hook.disable()
      if (error) reject(error)
      else setImmediate(() => resolve(promises))
    })
  })
}

inBothModes(database, 'fifty requests on one socket leave it with the listeners it had', async (t, commitOn) => {
  const counts: number[] = []
  const during: number[] = []
  const { app, connectionString, ready } = handmade(t, database)
  await app.register(requestDb, { connectionString, commitOn })
  app.addHook('onRequest', (request, _reply, done) => {
    counts.push(request.raw.socket.listenerCount('close'))
    done()
  })
  app.post('/', async (request) => {
    await add(request.db, 'x')
    during.push(request.raw.socket.listenerCount('close'))
    return 'ok'
  })
  await ready()
  const client = await openHttp(t, app)
  for (let n = 0; n < 50; n++) t.equal((await client.send('POST', '/', { body: {} }).response()).status, 200)
  t.equal(new Set(counts.slice(1)).size, 1, 'constant from the second request on')
  t.equal(new Set(during).size, 1, 'one listener for the socket, however many requests it has carried')
  t.equal(counts.at(-1), during[0])
  await holds(t, database, Array<string>(50).fill('x'))
})

inBothModes(
  database,
  'a hundred requests side by side on one pipelined socket do not pile up listeners',
  async (t, commitOn) => {
    const { app, connectionString, ready } = handmade(t, database)
    let most = 0
    await app.register(requestDb, { connectionString, commitOn, pool: { size: 2 } })
    app.post('/', async (request) => {
      await add(request.db, 'x')
      most = Math.max(most, request.raw.socket.listenerCount('close'))
      return 'ok'
    })
    await ready()
    const client = await openHttp(t, app)
    for (let n = 0; n < 100; n++) client.send('POST', '/', { body: {} })
    for (let n = 0; n < 100; n++) t.equal((await client.response()).status, 200)
    t.ok(most <= Socket.defaultMaxListeners, `never more than ${most}`)
    await holds(t, database, Array<string>(100).fill('x'))
  },
)
