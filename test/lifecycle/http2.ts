import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp2 } from '../support/http2-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* HTTP/2: a stream that is reset makes Fastify call onResponse, with status 200, while the handler is still at work. */
const database = await createDatabase(t, { sql: NOTES })
const http2 = { http2: true } as const
const bodyOf = (method: string) => (method === 'POST' ? { body: { note: 'x' } } : {})

inBothModes(database, 'answers over HTTP/2 are kept or rolled back like others', async (t, commitOn) => {
  const routes = (app: FastifyInstance) => {
    app.route<{ Querystring: { status: number } }>({
      method: ['GET', 'POST'],
      url: '/',
      schema: { querystring: { type: 'object', properties: { status: { type: 'number' } } } },
      handler: async (request, reply) => {
        await add(request.db, `${request.method} ${request.query.status}`)
        if (request.query.status === 418) throw new Error('mine')
        return reply.code(request.query.status).send({ ok: true })
      },
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, http2)
  const client = await openHttp2(t, app)
  for (const method of ['GET', 'POST']) {
    for (const [status, answer] of [
      [200, 200],
      [404, 404],
      [418, 500],
    ]) {
      const sent = client.send(method, `/?status=${status}`, bodyOf(method))
      t.equal((await sent.response()).status, answer)
    }
  }
  await holds(t, database, ['GET 200', 'POST 200'])
})

for (const method of ['GET', 'POST']) {
  inBothModes(database, `a ${method} that is reset is rolled back, its neighbour is kept`, async (t, commitOn) => {
    const log = captureLog()
    const goOn = gate()
    const late = gate<string>()
    const routes = (app: FastifyInstance) => {
      app.route<{ Querystring: { note: string } }>({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          await add(request.db, request.query.note)
          await goOn.opened
          if (request.query.note === 'kept') return 'ok'
          await add(request.db, 'late').catch((error) => late.open(error.code))
          return 'ok'
        },
      })
    }
    const app = await buildApp(t, database, { commitOn, pool: { size: 2 } }, routes, { ...http2, logger: log.options })
    const client = await openHttp2(t, app)
    const leaving = client.send(method, '/?note=gone', bodyOf(method))
    const staying = client.send(method, '/?note=kept', bodyOf(method))
    await eventually(() => app.db.snapshot().holders.filter(({ statements }) => statements === 1).length === 2)
    leaving.reset()
    await eventually(() => app.db.snapshot().checkedOut === 1, { withinMillis: 1000 })
    goOn.open()
    t.equal(await late.opened, 'FST_REQUEST_DB_SESSION_ENDED')
    t.equal((await staying.response()).status, 200)
    await holds(t, database, ['kept'])
    t.equal(app.db.snapshot().totals.checkouts, 2)
    t.strictSame(log.problems(), [], 'nobody hijacked a reply')
  })

  inBothModes(database, `a ${method} that is reset before its first use gets no connection`, async (t, commitOn) => {
    const arrived = gate()
    const goOn = gate()
    const refused = gate<string>()
    const routes = (app: FastifyInstance) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          arrived.open()
          await goOn.opened
          await add(request.db, 'x').catch((error) => refused.open(error.code))
          return 'ok'
        },
      })
    }
    const app = await buildApp(t, database, { commitOn }, routes, http2)
    const client = await openHttp2(t, app)
    const request = client.send(method, '/', bodyOf(method))
    await arrived.opened
    request.reset()
    await eventually(() => request.stream.closed)
    await client.send('GET', '/nowhere').response()
    goOn.open()
    t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
    await holds(t, database, [])
    t.equal(app.db.snapshot().totals.checkouts, 0)
  })

  inBothModes(database, `a ${method} that is reset during a long statement`, async (t, commitOn) => {
    const routes = (app: FastifyInstance) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          await add(request.db, 'x')
          await sql`select pg_sleep(30)`.execute(request.db)
          return 'ok'
        },
      })
    }
    const app = await buildApp(t, database, { commitOn }, routes, http2)
    const client = await openHttp2(t, app)
    const request = client.send(method, '/', bodyOf(method))
    await eventually(() => app.db.snapshot().holders[0]?.statements === 2)
    request.reset()
    await eventually(() => app.db.snapshot().checkedOut === 0)
    await holds(t, database, [])
    t.match(app.db.snapshot().totals, { cancels: 1, opened: 1 })
  })

  inBothModes(database, `a ${method} that is reset in an onSend hook`, async (t, commitOn) => {
    const arrived = gate()
    const goOn = gate()
    const routes = (app: FastifyInstance) => {
      app.addHook('onSend', async () => {
        arrived.open()
        await goOn.opened
      })
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          await add(request.db, 'x')
          return 'ok'
        },
      })
    }
    const app = await buildApp(t, database, { commitOn }, routes, http2)
    const client = await openHttp2(t, app)
    const request = client.send(method, '/', bodyOf(method))
    await arrived.opened
    request.reset()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    goOn.open()
    await holds(t, database, [])
  })

  inBothModes(database, `a ${method} that is reset while its body is streamed`, async (t, commitOn) => {
    const routes = (app: FastifyInstance) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          await add(request.db, 'x')
          const query = sql<{ n: number }>`(select n from generate_series(1, 1000000) n)`
          const rows = request.db.selectFrom(query.as('series')).select('n').stream(1)
          return Readable.from(
            (async function* () {
              for await (const { n } of rows) yield `row ${n}\n`
            })(),
          )
        },
      })
    }
    const app = await buildApp(t, database, { commitOn }, routes, http2)
    const client = await openHttp2(t, app)
    const request = client.send(method, '/', bodyOf(method))
    await eventually(() => request.received().includes('row'))
    request.reset()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    await holds(t, database, [])
  })
}

inBothModes(database, 'a connection that goes down takes all of its requests along', async (t, commitOn) => {
  const never = gate()
  const routes = (app: FastifyInstance) => {
    app.route({
      method: ['GET', 'POST'],
      url: '/',
      handler: async (request) => {
        await add(request.db, 'x')
        await never.opened
        return 'ok'
      },
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, http2)
  const client = await openHttp2(t, app)
  for (const method of ['GET', 'POST', 'GET']) client.send(method, '/', bodyOf(method))
  await eventually(() => app.db.snapshot().holders.filter(({ statements }) => statements === 1).length === 3)
  client.session.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
  never.open()
  await holds(t, database, [])
})

inBothModes(database, 'a request that is reset while COMMIT is under way stays committed', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const routes = (app: FastifyInstance) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  }
  const app = await buildApp(t, database, options, routes, http2)
  const sent = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
  const client = await openHttp2(t, app)
  const request = client.send('POST', '/', bodyOf('POST'))
  await sent.sprung
  t.strictSame(await notesIn(database), [])
  request.reset()
  await client.send('GET', '/nowhere').response()
  sent.release()
  await holds(t, database, ['x'])
})

inBothModes(database, 'an upload that is reset', async (t, commitOn) => {
  const schema = { body: { type: 'object', required: ['whole'] } }
  const routes = (app: FastifyInstance) => {
    app.addHook('onRequest', async (request) => void (await add(request.db, 'early')))
    app.post('/', { schema }, async () => 'ok')
  }
  const app = await buildApp(t, database, { commitOn }, routes, http2)
  const client = await openHttp2(t, app)
  // Node ends the body of an upload that is reset as if it were whole, so only what is in it can tell.
  const request = client.send('POST', '/', { body: { part: 'x' }, endStream: false })
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  request.reset()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
  await holds(t, database, [])
})

inBothModes(database, 'a header that HTTP/2 drops does not cost the commit', async (t, commitOn) => {
  const routes = (app: FastifyInstance) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      return reply.header('content-disposition', 'attachment; filename="\u2013.pdf"').send('ok')
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, http2)
  const client = await openHttp2(t, app)
  const { status } = await client.send('GET', '/').response()
  await holds(t, database, status === 200 ? ['x'] : [])
})
