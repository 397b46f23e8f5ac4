import type { FastifyInstance } from 'fastify'
import { Counter, Registry, register } from 'prom-client'
import requestDb from '../lib/index.ts'
import requestDbMetrics, { type MetricsOptions } from '../lib/metrics.ts'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { handmade } from './support/handmade.ts'
import { NOTES } from './support/schema.ts'
import { subscribed } from './support/telemetry.ts'
import { t, test } from './support/test.ts'

/* What Prometheus is told of a pool, through a real prom-client. */
const database = await createDatabase(t, { sql: NOTES })
const add = (app: FastifyInstance) => app.db.session((db) => db.insertInto('notes').values({ note: 'x' }).execute())

/** What a scrape says: by name and labels, `name{a="1",b="2"}`. Without the buckets. */
async function scrape(registry: Registry): Promise<Record<string, number>> {
  const lines = (await registry.metrics()).split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return Object.fromEntries(
    lines
      .filter((line) => !line.includes('_bucket'))
      .map((line) => {
        const space = line.lastIndexOf(' ')
        const label = line.slice(0, space).replaceAll('db_client_connection_pool_name', 'pool')
        return [label.replaceAll('db_client_connection_state', 'state'), Number(line.slice(space + 1))]
      }),
  )
}

test('the pool as it is now, and its totals, are in a scrape', async (t) => {
  const registry = new Registry()
  const goOn = gate()
  const app = await buildApp(t, database, { pool: { size: 2, maxOverflow: 1 } }, (app) => {
    app.register(requestDbMetrics, { registry })
    app.get('/', async (request) => {
      await request.db.selectFrom('notes').selectAll().execute()
      await goOn.opened
    })
    app.get('/bad', async (request) => {
      await request.db.selectFrom('notes').selectAll().execute()
      throw new Error('no')
    })
  })
  const before = await scrape(registry)
  t.equal(before['db_client_connection_count{pool="db",state="idle"}'], 0)
  t.equal(before['db_client_connection_wait_time_seconds_count{pool="db"}'], 0, 'histograms are there from the start')
  t.equal(before['fastify_request_db_reports_total{pool="db",cause="leak"}'], 0)

  const all = [1, 2, 3, 4].map(() => app.inject('/'))
  await eventually(() => app.db.snapshot().checkedOut === 3 && app.db.snapshot().waiting === 1)
  t.match(await scrape(registry), {
    'db_client_connection_count{pool="db",state="idle"}': 0,
    'db_client_connection_count{pool="db",state="used"}': 3,
    'db_client_connection_max{pool="db"}': 3,
    'db_client_connection_idle_max{pool="db"}': 2,
    'db_client_connection_pending_requests{pool="db"}': 1,
    'db_client_connection_timeouts_total{pool="db"}': 0,
    'db_client_connection_create_time_seconds_count{pool="db"}': 3,
    'db_client_connection_wait_time_seconds_count{pool="db"}': 3,
    'db_client_connection_use_time_seconds_count{pool="db"}': 0,
  })
  goOn.open()
  await Promise.all(all)
  await app.inject('/bad')
  await eventually(() => app.db.snapshot().checkedOut === 0 && app.db.snapshot().open === 2)
  const after = await scrape(registry)
  t.match(after, {
    'db_client_connection_count{pool="db",state="idle"}': 2,
    'db_client_connection_count{pool="db",state="used"}': 0,
    'db_client_connection_pending_requests{pool="db"}': 0,
    'db_client_connection_wait_time_seconds_count{pool="db"}': 5,
    'db_client_connection_use_time_seconds_count{pool="db"}': 5,
    'fastify_request_db_commits_total{pool="db"}': 4,
    'fastify_request_db_rollbacks_total{pool="db"}': 1,
    'fastify_request_db_failed_commits_total{pool="db"}': 0,
  })
  const use = after['db_client_connection_use_time_seconds_sum{pool="db"}'] as number
  t.ok(use > 0 && use < 30, 'in seconds', { use })
})

test('who waits too long, and why, is counted', async (t) => {
  const registry = new Registry()
  const goOn = gate()
  const app = await buildApp(t, database, { pool: { size: 1, timeoutMillis: 50, maxWaiting: 1 } }, (app) => {
    app.register(requestDbMetrics, { registry })
    app.get('/', async (request) => {
      await request.db.selectFrom('notes').selectAll().execute()
      await goOn.opened
    })
  })
  const first = app.inject('/')
  await eventually(() => app.db.snapshot().checkedOut === 1)
  const refused = await Promise.all([app.inject('/'), app.inject('/')])
  t.strictSame(
    refused.map(({ statusCode }) => statusCode),
    [503, 503],
  )
  goOn.open()
  await first
  const told = await scrape(registry)
  t.match(told, {
    'db_client_connection_timeouts_total{pool="db"}': 1,
    'fastify_request_db_saturated_total{pool="db"}': 1,
  })
  const reports = Object.entries(told).filter(([name]) => name.startsWith('fastify_request_db_reports_total{'))
  const sum = reports.reduce((sum, [, value]) => sum + value, 0)
  t.ok(sum > 0, 'its causes are counted', { reports })
})

test('two pools of an app share a registry under their names', async (t) => {
  const registry = new Registry()
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(requestDb, {
      connectionString: database.connectionString,
      decorator: 'reports',
      capacityCheck: false,
      pool: { size: 3 },
    })
    app.register(requestDbMetrics, { registry })
    app.register(requestDbMetrics, { registry, decorator: 'reports' })
  })
  await add(app)
  t.match(await scrape(registry), {
    'db_client_connection_max{pool="db"}': 10,
    'db_client_connection_max{pool="reports"}': 3,
    'db_client_connection_use_time_seconds_count{pool="db"}': 1,
    'db_client_connection_use_time_seconds_count{pool="reports"}': 0,
    'fastify_request_db_commits_total{pool="db"}': 1,
    'fastify_request_db_commits_total{pool="reports"}': 0,
  })
})

test('two apps share a registry, and each takes only its own away', async (t) => {
  const registry = new Registry()
  const withMetrics = (app: FastifyInstance) => app.register(requestDbMetrics, { registry })
  const one = await buildApp(t, database, { decorator: 'db', pool: { size: 2 } }, withMetrics)
  const two = await buildApp(t, database, { decorator: 'db', pool: { size: 3 } }, withMetrics)
  await Promise.all([add(one), add(two), add(two)])
  t.match(
    await scrape(registry),
    {
      'db_client_connection_max{pool="db"}': 5,
      'fastify_request_db_commits_total{pool="db"}': 3,
      'db_client_connection_use_time_seconds_count{pool="db"}': 3,
    },
    'pools of one name are added up',
  )
  await one.close()
  t.match(await scrape(registry), {
    'db_client_connection_max{pool="db"}': 3,
    'fastify_request_db_commits_total{pool="db"}': 2,
    'db_client_connection_use_time_seconds_count{pool="db"}': 3,
  })
  await two.close()
  t.strictSame(await scrape(registry), {}, 'nothing is left of them')
})

test('nobody listens before the registration, nor after the close', async (t) => {
  t.strictSame(subscribed(), [])
  const registry = new Registry()
  const app = await buildApp(t, database, {}, (app) => {
    app.register(requestDbMetrics, { registry })
  })
  t.strictSame(subscribed(), ['connect', 'checkout', 'checkin', 'report'])
  await app.close()
  t.strictSame(subscribed(), [])
})

test('the metrics are served where the app wants it, and nowhere else', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    app.register(requestDbMetrics, { path: '/metrics' })
  })
  t.teardown(() => register.clear())
  const answer = await app.inject('/metrics')
  t.equal(answer.statusCode, 200)
  t.match(answer.headers['content-type'], /^text\/plain; version=0\.0\.4/)
  t.match(
    answer.body,
    /^db_client_connection_max\{db_client_connection_pool_name="db"\} 10$/m,
    'of the global registry',
  )
  t.match(answer.body, /^# TYPE db_client_connection_use_time_seconds histogram$/m)
  t.equal(app.db.snapshot().totals.checkouts, 0, 'a scrape takes no connection')

  const silent = await buildApp(t, database, {}, (app) => {
    app.register(requestDbMetrics, { registry: new Registry() })
  })
  t.equal((await silent.inject('/metrics')).statusCode, 404)
})

test('a registry that was cleared is filled again by the next app', async (t) => {
  const registry = new Registry()
  const one = await buildApp(t, database, {}, (app) => void app.register(requestDbMetrics, { registry }))
  registry.clear()
  await buildApp(t, database, { pool: { size: 7 } }, (app) => void app.register(requestDbMetrics, { registry }))
  await add(one)
  t.match(await scrape(registry), { 'db_client_connection_max{pool="db"}': 7 })
})

test('what cannot be measured is refused by name', async (t) => {
  const refuses = async (options: object, message: RegExp, decorator = 'db') => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { connectionString, decorator, capacityCheck: false })
    app.register(requestDbMetrics, options as MetricsOptions)
    await t.rejects(async () => void (await app.ready()), { code: 'FST_REQUEST_DB_INVALID_OPTION', message })
  }
  await refuses({}, /decorator: expected the `decorator` of a fastify-request-db .*, got 'db'/, 'other')
  await refuses({ registry: {} }, /registry: expected a Registry of prom-client, got a value of type object/)
  await refuses({ path: 'metrics' }, /path: expected a path such as '\/metrics', got 'metrics'/)
  await refuses({ pathh: '/metrics' }, /pathh: expected one of decorator, registry, path, got an unknown name/)
  await refuses({ decorator: 1 }, /decorator: expected a name, got 1/)

  const registry = new Registry()
  const { app, connectionString } = handmade(t, database)
  app.register(requestDb, { connectionString, capacityCheck: false })
  app.register(requestDbMetrics, { registry })
  app.register(requestDbMetrics, { registry })
  await t.rejects(async () => void (await app.ready()), { message: /not in this registry yet, got 'db'/ })

  const taken = new Registry()
  new Counter({ name: 'db_client_connection_max', help: 'of somebody else', registers: [taken] })
  const other = handmade(t, database)
  other.app.register(requestDb, { connectionString: other.connectionString, capacityCheck: false })
  other.app.register(requestDbMetrics, { registry: taken })
  await t.rejects(async () => void (await other.app.ready()), { message: /db_client_connection_max has already/ })
})
