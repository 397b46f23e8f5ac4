// The package as it is published, on whatever Node runs this: imported, required, and one request against DATABASE_URL.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import Fastify from 'fastify'
import requestDb, { requestDb as byName } from 'fastify-request-db'
import { sql } from 'kysely'

const required = createRequire(import.meta.url)('fastify-request-db')
assert.equal(required, requestDb, 'require() is the plugin')
assert.equal(byName, requestDb)

process.on('warning', (warning) => {
  if (warning.name !== 'ExperimentalWarning') throw warning
})

const table = `smoke_${process.pid}`
const app = Fastify()
await app.register(requestDb, { connectionString: process.env.DATABASE_URL, pool: { size: 2 } })
app.post('/', async (request, reply) => {
  reply.code(201)
  return request.db.insertInto(table).values({ note: request.body.note }).returningAll().executeTakeFirstOrThrow()
})
app.get('/', (request) => request.db.selectFrom(table).selectAll().execute())

await app.ready()
await sql`create table ${sql.table(table)} (id int generated always as identity, note text)`.execute(app.db.kysely)
const created = await app.inject({ method: 'POST', url: '/', body: { note: 'hello' } })
assert.equal(created.statusCode, 201, created.body)
assert.deepEqual((await app.inject('/')).json(), [{ id: 1, note: 'hello' }])
assert.equal(app.db.snapshot().checkedOut, 0)
await sql`drop table ${sql.table(table)}`.execute(app.db.kysely)
await app.close()
console.log(`Node ${process.version}: import, require and a request are fine`)
