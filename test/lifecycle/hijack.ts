import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Answers that go past Fastify: nothing is committed for them but by hand, and the log says so once. */
const database = await createDatabase(t, { sql: NOTES })

type End = (request: FastifyRequest, reply: FastifyReply) => unknown

const ends: Record<string, End> = {
  'reply.hijack() and raw.end()': (_request, reply) => {
    reply.hijack()
    reply.raw.end('raw')
  },
  'raw.end() without hijack': (_request, reply) => void reply.raw.end('raw'),
  'raw.writeHead(), raw.write() and raw.end()': (_request, reply) => {
    reply.hijack()
    reply.raw.writeHead(200)
    reply.raw.write('r')
    reply.raw.end('aw')
  },
  'a hijack whose handler throws after the end': (_request, reply) => {
    reply.hijack()
    reply.raw.end('raw')
    throw new Error('mine')
  },
}

for (const [name, end] of Object.entries(ends)) {
  inBothModes(database, `${name}: rolled back, with one warning`, async (t, commitOn) => {
    const log = captureLog()
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => writing(app, end), {
      logger: log.options,
    })
    const client = await openHttp(t, app)
    for (const method of ['GET', 'POST']) {
      t.match(await client.send(method, '/', method === 'POST' ? { body: {} } : {}).response(), { body: 'raw' })
      await holds(t, database, [])
    }
    t.match(await app.inject('/'), { statusCode: 200, body: 'raw' })
    await holds(t, database, [])
    t.equal(log.problems().length, 3)
    t.match(log.problems()[0]?.msg, /hijacked .* rolled back/)
    t.match(app.db.snapshot().totals, { opened: 1, rollbacks: 3 })
  })

  inBothModes(database, `${name}: what was committed by hand is kept, without a warning`, async (t, commitOn) => {
    const log = captureLog()
    const byHand: End = async (request, reply) => {
      await request.db.commit()
      return end(request, reply)
    }
    const app = await buildApp(t, database, { commitOn }, (app) => writing(app, byHand), { logger: log.options })
    const client = await openHttp(t, app)
    t.match(await client.send('GET', '/').response(), { body: 'raw' })
    await holds(t, database, ['x'])
    t.strictSame(log.problems(), [])
  })
}

inBothModes(database, 'a hijacked reply that never used the session is no reason to warn', async (t, commitOn) => {
  const log = captureLog()
  const routes = (app: FastifyInstance) => {
    app.get('/', (request, reply) => {
      t.equal(request.db.state, 'idle')
      reply.hijack()
      reply.raw.end('raw')
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, { logger: log.options })
  t.equal((await app.inject('/')).body, 'raw')
  t.strictSame(log.problems(), [])
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

inBothModes(database, 'a hijacked reply that goes on for long holds its session until its end', async (t, commitOn) => {
  const goOn = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      reply.hijack()
      reply.raw.write('r')
      await goOn.opened
      await add(request.db, 'y')
      await request.db.commit()
      reply.raw.end('aw')
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await client.receives('r')
  t.equal(app.db.snapshot().checkedOut, 1)
  goOn.open()
  t.equal((await client.response()).body, 'raw')
  await holds(t, database, ['x', 'y'])
})

for (const how of ['destroy', 'reset', 'halfClose'] as const) {
  inBothModes(database, `a hijacked reply whose client leaves (${how})`, async (t, commitOn) => {
    const hijacked = { GET: gate(), POST: gate() }
    const app = await buildApp(t, database, { commitOn }, (app) =>
      writing(app, async (request, reply) => {
        reply.hijack()
        reply.raw.write('r')
        hijacked[request.method as 'GET' | 'POST'].open()
      }),
    )
    for (const method of ['GET', 'POST'] as const) {
      const client = await openHttp(t, app)
      client.send(method, '/', method === 'POST' ? { body: {} } : {})
      await hijacked[method].opened
      t.equal(app.db.snapshot().checkedOut, 1)
      client[how]()
      await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
      await holds(t, database, [])
    }
  })
}

inBothModes(database, 'a hijacked reply whose handler throws is over when its client leaves', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) =>
    writing(app, async (_request, reply) => {
      reply.hijack()
      throw new Error('mine')
    }),
  )
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  client.destroy()
  await holds(t, database, [])
})

inBothModes(database, 'raw.destroy() in the handler', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) =>
    writing(app, async (_request, reply) => void reply.raw.destroy()),
  )
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await eventually(() => client.closed)
  await holds(t, database, [])
})

function writing(app: FastifyInstance, end: End): void {
  app.route({
    method: ['GET', 'POST'],
    url: '/',
    handler: async (request, reply) => {
      await add(request.db, 'x')
      return end(request, reply)
    },
  })
}
