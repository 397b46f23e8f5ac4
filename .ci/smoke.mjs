// The package as it is published, on whatever Node runs this: imported, required, and one request against DATABASE_URL.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import Fastify from 'fastify'
import requestDb, { requestDb as byName, currentSession, listen } from 'fastify-request-db'
import requestDbDashboard from 'fastify-request-db/dashboard'
import requestDbMetrics from 'fastify-request-db/metrics'
import requestDbOpenTelemetry from 'fastify-request-db/opentelemetry'
import { beginTest } from 'fastify-request-db/testing'
import { sql } from 'kysely'

const require = createRequire(import.meta.url)
assert.equal(require('fastify-request-db'), requestDb, 'require() is the plugin')
assert.equal(require('fastify-request-db/dashboard'), requestDbDashboard)
assert.equal(require('fastify-request-db/metrics'), requestDbMetrics)
assert.equal(require('fastify-request-db/opentelemetry'), requestDbOpenTelemetry)
assert.equal(require('fastify-request-db/testing').beginTest, beginTest)
assert.equal(byName, requestDb)
assert.deepEqual({ ...require('fastify-request-db') }, { ...require('fastify-request-db'), currentSession, listen })

process.on('warning', (warning) => {
  if (warning.name !== 'ExperimentalWarning') throw warning
})

const table = `smoke_${process.pid}`
const app = Fastify()
await app.register(requestDb, {
  connectionString: process.env.DATABASE_URL,
  pool: { size: 2 },
  asyncContext: true,
})
await app.register(requestDbDashboard, { path: '/pool' })
await app.register(requestDbMetrics, { path: '/metrics' })
await app.register(requestDbOpenTelemetry)
app.post('/', async (request, reply) => {
  reply.code(201)
  return request.db.insertInto(table).values({ note: request.body.note }).returningAll().executeTakeFirstOrThrow()
})
app.get('/', (request) => request.db.selectFrom(table).selectAll().execute())
let runs = 0
app.get('/again', { config: { db: { retry: {} } } }, async (request) => {
  await sql`select 1`.execute(currentSession())
  if (++runs === 1) throw Object.assign(new Error('again'), { code: '40001' })
  return { runs, same: currentSession() === request.db }
})

await app.ready()
await sql`create table ${sql.table(table)} (id int generated always as identity, note text)`.execute(app.db.kysely)
const created = await app.inject({ method: 'POST', url: '/', body: { note: 'hello' } })
assert.equal(created.statusCode, 201, created.body)
assert.deepEqual((await app.inject('/')).json(), [{ id: 1, note: 'hello' }])
assert.deepEqual((await app.inject('/again')).json(), { runs: 2, same: true })
const transaction = await beginTest(app)
await app.inject({ method: 'POST', url: '/', body: { note: 'undone' } })
assert.equal((await app.inject('/')).json().length, 2)
await transaction.assertNothingLeft()
await transaction.rollback()
assert.equal((await app.inject('/')).json().length, 1)
assert.equal(app.db.snapshot().checkedOut, 0)
await sql`drop table ${sql.table(table)}`.execute(app.db.kysely)
for (const file of ['', '/page.js', '/icon.svg']) assert.equal((await app.inject(`/pool${file}`)).statusCode, 200, file)
assert.match((await app.inject('/metrics')).body, /^db_client_connection_count/m)
await app.close()
console.log(`Node ${process.version}: import, require and a request are fine`)
