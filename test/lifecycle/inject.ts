import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* app.inject(): a request without a socket, whose signal stands for the client that leaves. */
const database = await createDatabase(t, { sql: NOTES })

inBothModes(database, 'a GET whose signal is aborted in the handler', async (t, commitOn) => {
  const log = captureLog()
  const goOn = gate()
  const late = gate<string>()
  const routes = (app: FastifyInstance) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      await goOn.opened
      await add(request.db, 'late').catch((error) => late.open(error.code))
      return 'ok'
    })
  }
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, routes, { logger: log.options })
  const leave = new AbortController()
  const answer = app.inject({ url: '/', signal: leave.signal })
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  leave.abort()
  await t.rejects(answer)
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
  goOn.open()
  t.equal(await late.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  await holds(t, database, [])
  t.match(app.db.snapshot().totals, { checkouts: 1, opened: 1 })
  t.strictSame(log.problems(), [], 'nobody hijacked a reply')
})

inBothModes(database, 'a GET whose signal is aborted during a long statement', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      await sql`select pg_sleep(30)`.execute(request.db)
      return 'ok'
    })
  })
  const leave = new AbortController()
  const answer = app.inject({ url: '/', signal: leave.signal })
  await eventually(() => app.db.snapshot().holders[0]?.statements === 2)
  leave.abort()
  await t.rejects(answer)
  await holds(t, database, [])
  t.match(app.db.snapshot().totals, { cancels: 1, opened: 1 })
})

inBothModes(
  database,
  'a POST whose body was read does not hear of its signal, and is answered',
  async (t, commitOn) => {
    const goOn = gate()
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.post('/', async (request) => {
        await add(request.db, 'x')
        await goOn.opened
        return 'ok'
      })
    })
    const leave = new AbortController()
    const answer = app.inject({ method: 'POST', url: '/', body: {}, signal: leave.signal })
    await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
    leave.abort()
    goOn.open()
    t.equal((await answer).statusCode, 200)
    await holds(t, database, ['x'])
  },
)

inBothModes(database, 'a session route that calls another one while all connections are taken', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1, timeoutMillis: 500 } }, (app) => {
    app.post('/inner', async (request) => {
      await add(request.db, 'inner')
      return 'ok'
    })
    app.post('/outer', async (request) => {
      await add(request.db, 'outer')
      const { statusCode } = await app.inject({ method: 'POST', url: '/inner' })
      return { statusCode }
    })
  })
  const answer = await app.inject({ method: 'POST', url: '/outer' })
  t.match(answer, { statusCode: 200, body: '{"statusCode":503}' })
  await holds(t, database, ['outer'])
  t.equal(app.db.snapshot().totals.timeouts, 1)
})

inBothModes(database, 'a second session in one request while all connections are taken', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1, timeoutMillis: 500 } }, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'first')
      await app.db.session((db) => add(db, 'second'))
      return 'ok'
    })
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.match(answer, { statusCode: 503, body: /FST_REQUEST_DB_POOL_TIMEOUT/ })
  t.match(answer.headers, { 'retry-after': /\d+/ })
  await holds(t, database, [])
})

inBothModes(database, 'a body that is read as a stream, to its end', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, streaming)
  const answer = await app.inject({ url: '/3', payloadAsStream: true })
  t.equal(await text(answer.stream()), 'row 1\nrow 2\nrow 3\n')
  await holds(t, database, ['x'])
})

function streaming(app: FastifyInstance): void {
  app.get<{ Params: { rows: string } }>('/:rows', async (request) => {
    await add(request.db, 'x')
    const query = sql<{ n: number }>`(select n from generate_series(1, ${request.params.rows}::int) n)`
    const rows = request.db.selectFrom(query.as('series')).select('n').stream(1)
    return Readable.from(
      (async function* () {
        for await (const { n } of rows) yield `row ${n}\n`
      })(),
    )
  })
}
