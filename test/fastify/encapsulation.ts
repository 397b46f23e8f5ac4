import Fastify, { type FastifyInstance } from 'fastify'
import requestDb from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* Registered in a child scope, the plugin is there for that scope and what is in it. */

const first = await createDatabase(t, { sql: `${NOTES}; insert into notes (note) values ('first')` })
const second = await createDatabase(t, { sql: `${NOTES}; insert into notes (note) values ('second')` })

const read = (app: FastifyInstance, url: string) =>
  app.get(url, async ({ db }) => (await db.selectFrom('notes').select('note').execute()).map(({ note }) => note))

test('two sibling scopes with a database each, and a scope without', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const scope = (connectionString: string) => async (app: FastifyInstance) => {
    await app.register(requestDb, { connectionString, capacityCheck: false })
    read(app, '/')
    await app.register(async (inner) => void read(inner, '/inner'), { prefix: '/deep' })
  }
  app.register(scope(first.connectionString), { prefix: '/first' })
  app.register(scope(second.connectionString), { prefix: '/second' })
  app.get('/outside', async (request) => ({ has: 'db' in request && request.db !== undefined }))
  t.strictSame((await app.inject('/first')).json(), ['first'])
  t.strictSame((await app.inject('/second')).json(), ['second'])
  t.strictSame((await app.inject('/first/deep/inner')).json(), ['first'])
  t.strictSame((await app.inject('/outside')).json(), { has: false })
  await app.close()
  t.strictSame([await first.backends(), await second.backends()], [[], []])
})

test('the same name twice in one scope is refused, another name is not', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const { connectionString } = first
  await app.register(requestDb, { connectionString, capacityCheck: false })
  await app.register(requestDb, { connectionString, capacityCheck: false, decorator: 'reports' })
  await t.rejects(
    (async () => {
      await app.register(requestDb, { connectionString })
    })(),
    { code: 'FST_REQUEST_DB_ALREADY_REGISTERED' },
  )
})
