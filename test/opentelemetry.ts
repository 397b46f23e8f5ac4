import { context, SpanStatusCode } from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import type { Histogram } from '@opentelemetry/sdk-metrics'
import type { ReadableSpan } from '@opentelemetry/sdk-trace-base'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import requestDb, { type RequestDbOptions } from '../lib/index.ts'
import requestDbOpenTelemetry, { type OpenTelemetryOptions } from '../lib/opentelemetry.ts'
import { buildApp } from './support/app.ts'
import { captureLog } from './support/captured-log.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { handmade } from './support/handmade.ts'
import { NOTES } from './support/schema.ts'
import { type Point, subscribed, telemetry, traceRequests } from './support/telemetry.ts'
import { type Test, t, test } from './support/test.ts'

/* Spans and metrics of real requests, through OpenTelemetry's own SDKs. */
const database = await createDatabase(t, { sql: NOTES })
context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable())
t.teardown(() => context.disable())

const sumOf = (point: Point | undefined) => (point?.[1] as Histogram | undefined)?.sum ?? Number.NaN
const parentOf = ({ parentSpanContext }: ReadableSpan) => parentSpanContext?.spanId
const millis = ([seconds, nanos]: [number, number]) => seconds * 1000 + nanos / 1e6

async function traced(
  t: Test,
  options: RequestDbOptions = {},
  more: OpenTelemetryOptions = {},
  routes: (app: FastifyInstance) => unknown = () => {},
) {
  const seen = telemetry(t)
  const app = await buildApp(t, database, options, (app) => {
    traceRequests(app, seen.tracer)
    app.register(requestDbOpenTelemetry, { ...seen.providers, ...more })
    app.get('/note', (request) =>
      request.db.selectFrom('notes').select('note').where('note', '=', 'secret').executeTakeFirst(),
    )
    app.post('/note', async (request) => {
      await request.db.insertInto('notes').values({ note: 'secret' }).execute()
      return 'ok'
    })
    app.get('/bad', (request) => sql`select 1 / ${0}::int`.execute(request.db))
    return routes(app)
  })
  return { app, ...seen }
}

test('each statement and the end of its transaction are spans of their request', async (t) => {
  const { app, spans } = await traced(t)
  await app.inject({ method: 'POST', url: '/note' })
  await app.inject('/note')
  const [insert, commit, select, secondCommit] = spans() as [ReadableSpan, ReadableSpan, ReadableSpan, ReadableSpan]
  t.strictSame(
    spans().map(({ name }) => name),
    ['INSERT notes', 'COMMIT', 'SELECT notes', 'COMMIT'],
  )
  t.ok(insert.parentSpanContext, 'it has a parent')
  t.strictSame(parentOf(commit), parentOf(insert), 'COMMIT is in the same request')
  t.strictSame(parentOf(secondCommit), parentOf(select))
  t.not(parentOf(select), parentOf(insert))
  t.strictSame(select.attributes, {
    'db.system.name': 'postgresql',
    'db.operation.name': 'SELECT',
    'db.query.summary': 'SELECT notes',
    'db.client.connection.pool.name': 'db',
    'db.query.text': 'select "note" from "notes" where "note" = $1',
    'db.response.returned_rows': 1,
  })
  t.notMatch(JSON.stringify(spans().map(({ attributes, name }) => [attributes, name])), 'secret')
  t.equal(select.status.code, SpanStatusCode.UNSET)
  t.ok(millis(commit.duration) > 0 && millis(commit.startTime) >= millis(insert.startTime) - 1, 'COMMIT began after it')
})

test('requests at the same time keep their spans apart', async (t) => {
  const { app, spans } = await traced(t, { pool: { size: 2 } })
  await Promise.all(Array.from({ length: 12 }, () => app.inject('/note')))
  const byParent = new Map<string | undefined, string[]>()
  for (const span of spans()) byParent.set(parentOf(span), [...(byParent.get(parentOf(span)) ?? []), span.name])
  t.equal(byParent.size, 12)
  for (const names of byParent.values()) t.strictSame(names, ['SELECT notes', 'COMMIT'])
})

test('an error is told by its SQLSTATE, and not in words that quote parameters', async (t) => {
  const { app, spans, points } = await traced(t, {}, {}, (app) => {
    app.get('/quoting', (request) => sql`select ${'secret'}::text::int`.execute(request.db))
  })
  t.equal((await app.inject('/bad')).statusCode, 500)
  await app.inject('/quoting')
  await eventually(() => spans().length === 4)
  const [failed, rollback] = spans() as [ReadableSpan, ReadableSpan]
  t.match(failed, { name: 'SELECT', status: { code: SpanStatusCode.ERROR } })
  t.match(failed.attributes, { 'error.type': '22012', 'db.response.status_code': '22012' })
  t.match(rollback, { name: 'ROLLBACK', status: { code: SpanStatusCode.UNSET } })
  t.strictSame(rollback.parentSpanContext, failed.parentSpanContext)
  t.notMatch(JSON.stringify(spans().map(({ status, events, attributes }) => [status, events, attributes])), 'secret')
  const durations = await points('db.client.operation.duration')
  t.match(
    durations.find(([attributes]) => attributes['error.type'] === '22012'),
    [{ 'db.operation.name': 'SELECT', 'db.response.status_code': '22012' }, { count: 1 }],
  )
})

test('who waits in vain has a span as long as the wait, and is counted', async (t) => {
  const goOn = gate()
  const holding = gate()
  const { app, spans, points } = await traced(t, { pool: { size: 1, timeoutMillis: 60 } }, {}, (app) => {
    app.get('/hold', async (request) => {
      await request.db.selectFrom('notes').selectAll().execute()
      holding.open()
      await goOn.opened
    })
  })
  const held = app.inject('/hold')
  await holding.opened
  const [refused] = await Promise.all([
    app.inject('/note'),
    eventually(() => app.db.snapshot().waiters.length === 1).then(async () => {
      t.match(await points('db.client.connection.pending_requests'), [[{}, 1]])
      t.match(await points('db.client.connection.count'), [
        [{ 'db.client.connection.state': 'idle' }, 0],
        [{ 'db.client.connection.state': 'used' }, 1],
      ])
    }),
  ])
  t.equal(refused.statusCode, 503)
  goOn.open()
  await held
  const failed = spans().find(({ attributes }) => attributes['error.type'] !== undefined) as ReadableSpan
  t.match(failed.attributes, { 'error.type': 'FST_REQUEST_DB_POOL_TIMEOUT', 'db.response.status_code': undefined })
  t.ok(millis(failed.duration) >= 55, 'the wait is in it', { took: millis(failed.duration) })
  t.match(await points('db.client.connection.timeouts'), [[{ 'db.client.connection.pool.name': 'db' }, 1]])
})

test('the metrics bear the names of the conventions, and seconds', async (t) => {
  const { app, names, points } = await traced(t, { pool: { size: 3, maxOverflow: 1 } })
  await app.inject('/note')
  t.strictSame(await names(), [
    'db.client.connection.count',
    'db.client.connection.create_time',
    'db.client.connection.idle.max',
    'db.client.connection.max',
    'db.client.connection.pending_requests',
    'db.client.connection.timeouts',
    'db.client.connection.use_time',
    'db.client.connection.wait_time',
    'db.client.operation.duration',
  ])
  t.match(await points('db.client.connection.max'), [[{ 'db.client.connection.pool.name': 'db' }, 4]])
  t.match(await points('db.client.connection.idle.max'), [[{}, 3]])
  for (const name of ['create_time', 'wait_time', 'use_time']) {
    const [point] = await points(`db.client.connection.${name}`)
    t.match(point, [{ 'db.client.connection.pool.name': 'db' }, { count: 1 }], name)
    t.ok(sumOf(point) < 2, 'in seconds')
  }
  const operations = await points('db.client.operation.duration')
  t.strictSame(
    operations.map(([attributes]) => attributes),
    [
      { 'db.system.name': 'postgresql', 'db.operation.name': 'SELECT', 'db.query.summary': 'SELECT notes' },
      { 'db.system.name': 'postgresql', 'db.operation.name': 'COMMIT', 'db.query.summary': 'COMMIT' },
    ],
  )
})

test('two pools are told apart by name, and the app adds what it knows', async (t) => {
  const seen = telemetry(t)
  const app = await buildApp(t, database, {}, async (app) => {
    const { connectionString } = database
    await app.register(requestDb, { connectionString, decorator: 'reports', capacityCheck: false, pool: { size: 3 } })
    app.register(requestDbOpenTelemetry, {
      ...seen.providers,
      attributes: { 'db.namespace': 'shop' },
      queryText: false,
    })
    app.register(requestDbOpenTelemetry, { ...seen.providers, decorator: 'reports' })
    app.get('/', async (request) => {
      await request.db.selectFrom('notes').selectAll().execute()
      await (request as unknown as { reports: typeof request.db }).reports.deleteFrom('notes').execute()
    })
  })
  t.equal((await app.inject('/')).statusCode, 200)
  await eventually(() => seen.spans().length === 4)
  const of = (pool: string) =>
    seen.spans().filter(({ attributes }) => attributes['db.client.connection.pool.name'] === pool)
  t.strictSame(
    [of('db'), of('reports')].map((spans) => spans.map(({ name }) => name)),
    [
      ['SELECT notes', 'COMMIT'],
      ['DELETE notes', 'COMMIT'],
    ],
  )
  t.match(of('db')[0]?.attributes, { 'db.namespace': 'shop', 'db.query.text': undefined })
  t.match(await seen.points('db.client.connection.max'), [
    [{ 'db.client.connection.pool.name': 'db' }, 10],
    [{ 'db.client.connection.pool.name': 'reports' }, 3],
  ])
})

test('nobody listens before the registration, nor after the close', async (t) => {
  t.strictSame(subscribed(), [])
  const { app, points } = await traced(t)
  const reads = t.capture(app.db.pool, 'snapshot', app.db.pool.snapshot)
  t.strictSame(subscribed(), ['connect', 'checkout', 'checkin', 'statement-start', 'statement', 'commit', 'rollback'])
  t.match(await points('db.client.connection.max'), [[{}, 10]])
  t.equal(reads().length, 1, 'one snapshot for all of it')
  await app.close()
  t.strictSame(subscribed(), [])
  await points('db.client.connection.max')
  t.equal(reads().length, 0, 'the pool that is gone is not looked at any more')
})

test('a tracer that throws disturbs no request and is logged', async (t) => {
  const log = captureLog()
  const tracerProvider = { getTracer: () => ({ startSpan: () => fail(), startActiveSpan: () => fail() }) }
  const fail = () => {
    throw new Error('no span today')
  }
  const app = await buildApp(
    t,
    database,
    {},
    (app) => {
      app.register(requestDbOpenTelemetry, { tracerProvider })
      app.get('/', (request) => request.db.selectFrom('notes').selectAll().execute())
    },
    { logger: log.options },
  )
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(log.problems(), [{ reqId: 'req-1', msg: /could not be traced/, err: { message: 'no span today' } }])
})

test('without an SDK it does nothing, and what it cannot use it refuses', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    app.register(requestDbOpenTelemetry)
    app.get('/', (request) => request.db.selectFrom('notes').selectAll().execute())
  })
  t.equal((await app.inject('/')).statusCode, 200)

  const refuses = async (options: object, message: RegExp) => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { connectionString, capacityCheck: false })
    app.register(requestDbOpenTelemetry, options)
    await t.rejects(async () => void (await app.ready()), { code: 'FST_REQUEST_DB_INVALID_OPTION', message })
  }
  await refuses({ decorator: 'reports' }, /decorator: expected the `decorator` of a fastify-request-db/)
  await refuses({ tracerProvider: {} }, /tracerProvider: expected a TracerProvider/)
  await refuses({ queryText: 'yes' }, /queryText: expected true or false, got 'yes'/)
})
