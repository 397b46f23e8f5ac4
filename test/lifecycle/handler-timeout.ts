import { Readable } from 'node:stream'
import { sql } from 'kysely'
import { buildApp as build } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Fastify's handlerTimeout answers 503 and lets the handler run on. */
const database = await createDatabase(t, { sql: NOTES })
// Long enough for a handler to write its row first, on a connection that is open already.
const HANDLER_TIMEOUT = 300
const TIMED_OUT = { status: 503, body: /FST_ERR_HANDLER_TIMEOUT/ }

const buildApp: typeof build = async (...args) => {
  const app = await build(...args)
  await app.db.ping()
  return app
}

for (const end of ['returns', 'throws'] as const) {
  inBothModes(database, `a handler that ${end} after its timeout cannot write any more`, async (t, commitOn) => {
    const goOn = gate()
    const late = gate<string>()
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
        await add(request.db, 'early')
        await goOn.opened
        await add(request.db, 'late').catch((error) => late.open(error.code))
        if (end === 'throws') throw new Error('mine')
        return 'ok'
      })
    })
    const client = await openHttp(t, app)
    t.match(await client.send('GET', '/').response(), TIMED_OUT)
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    goOn.open()
    t.equal(await late.opened, 'FST_REQUEST_DB_SESSION_ENDED')
    await holds(t, database, [])
    t.match(app.db.snapshot().totals, { checkouts: 2, rollbacks: 1, opened: 1 })
    t.equal((await client.send('GET', '/nowhere').response()).status, 404, 'the socket lives on')
  })

  inBothModes(database, `a handler that ${end} while its session is rolled back harms nobody`, async (t, commitOn) => {
    const proxy = await startProxy(t, database.connectionString)
    const goOn = gate()
    const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
    const app = await buildApp(t, database, options, (app) => {
      app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
        await add(request.db, 'early')
        await goOn.opened
        if (end === 'throws') throw new Error('mine')
        return 'ok'
      })
    })
    const rollback = proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'hold')
    const client = await openHttp(t, app)
    client.send('GET', '/')
    await rollback.sprung
    goOn.open()
    await app.inject('/nowhere')
    rollback.release()
    const answer = await client.response()
    t.ok(answer.status >= 500, `never ${answer.status} for a row that is not kept`)
    await holds(t, database, [])
  })
}

inBothModes(database, 'the timeout cancels the statement that runs', async (t, commitOn) => {
  const failed = gate<string>()
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'early')
      await sql`select pg_sleep(30)`.execute(request.db).catch((error) => {
        failed.open(error.code)
        throw error
      })
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  t.match(await client.send('GET', '/').response(), TIMED_OUT)
  t.ok(['57014', 'FST_REQUEST_DB_SESSION_ENDED'].includes(await failed.opened))
  await holds(t, database, [])
  t.match(app.db.snapshot().totals, { cancels: 1, opened: 1 })
})

inBothModes(database, 'the timeout takes a request out of the queue', async (t, commitOn) => {
  const holding = gate()
  const goOn = gate()
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/hold', async (request) => {
      await add(request.db, 'held')
      holding.open()
      await goOn.opened
      return 'ok'
    })
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  })
  const held = app.inject('/hold')
  await holding.opened
  t.equal((await app.inject('/')).statusCode, 503)
  t.equal(app.db.snapshot().waiting, 0)
  goOn.open()
  t.equal((await held).statusCode, 200)
  await holds(t, database, ['held'])
})

inBothModes(database, 'a POST whose body was read has no timeout, and is not cut either', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.post('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'x')
      await sql`select pg_sleep(0.1)`.execute(request.db)
      t.ok(request.signal.aborted, 'Fastify aborts the signal once the body is read')
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  t.match(await client.send('POST', '/', { body: { note: 'x' } }).response(), { status: 200, body: 'ok' })
  await holds(t, database, ['x'])
})

inBothModes(database, 'a timeout while the body is streamed cuts it', async (t, commitOn) => {
  const closed = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'x')
      return Readable.from(
        (async function* () {
          try {
            while (true) {
              const { rows } = await sql<{ n: number }>`select 1 n from pg_sleep(0.01)`.execute(request.db)
              yield `row ${rows[0]?.n}\n`
            }
          } finally {
            closed.open()
          }
        })(),
      )
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await t.rejects(client.response(), /ended before the response was whole/)
  t.match(client.received, /row 1/)
  await closed.opened
  await holds(t, database, [])
})

inBothModes(database, 'a handler that returns before the slow error handler is not believed', async (t, commitOn) => {
  const failing = gate()
  const goOn = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.setErrorHandler(async (_error, _request, reply) => {
      failing.open()
      await goOn.opened
      return reply.code(503).send('handled')
    })
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'x')
      await failing.opened
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await eventually(() => app.db.snapshot().totals.rollbacks === 1)
  await app.inject('/nowhere')
  goOn.open()
  const { status, body } = await client.response()
  t.ok(status >= 500, `never ${status} ${body} for a row that is not kept`)
  await holds(t, database, [])
})

inBothModes(database, 'a timeout in an onSend hook of the app', async (t, commitOn) => {
  const goOn = gate()
  let passes = 0
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('onSend', async () => {
      if (passes++ === 0) await goOn.opened
    })
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  t.match(await client.send('GET', '/').response(), TIMED_OUT)
  goOn.open()
  await holds(t, database, [])
})

inBothModes(database, 'a timeout while COMMIT is under way comes too late', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const timedOut = gate()
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', { handlerTimeout: HANDLER_TIMEOUT }, async (request) => {
      request.signal.addEventListener('abort', () => timedOut.open())
      await add(request.db, 'x')
      return 'ok'
    })
  })
  const commit = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await commit.sprung
  // Once the answer has left, Fastify has stopped its clock.
  if (commitOn === 'onSend') await timedOut.opened
  t.strictSame(await notesIn(database), [])
  commit.release()
  t.match(await client.response(), { status: 200, body: 'ok' }, 'the answer that waited for it tells the truth')
  await holds(t, database, ['x'])
  await eventually(() => app.db.snapshot().totals.commits === 1)
  t.match(app.db.snapshot().totals, { rollbacks: 0, failedCommits: 0, opened: 1 })
})
