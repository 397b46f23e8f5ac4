import type { JsonSchemaToTsProvider } from '@fastify/type-provider-json-schema-to-ts'
import { type FastifyPluginAsyncTypebox, Type, type TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { notesIn } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* Bodies that are typed by their schemas, beside a session that is typed by its tables. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const routes: FastifyPluginAsyncTypebox = async (app) => {
  const Note = Type.Object({ note: Type.String({ minLength: 1 }) })
  app.post(
    '/notes',
    { schema: { body: Note, response: { 201: Type.Object({ note: Type.String() }) } }, config: { db: { retry: {} } } },
    async ({ db, body }, reply) => {
      reply.code(201)
      const text: string = body.note
      return db.insertInto('notes').values({ note: text }).returningAll().executeTakeFirstOrThrow()
    },
  )
}

test('TypeBox: the body is typed, what is wrong with it opens no session, and rows are serialized by schema', async (t) => {
  const app = await buildApp(t, database, {}, (app) => app.withTypeProvider<TypeBoxTypeProvider>().register(routes))
  const post = (payload: object) => app.inject({ method: 'POST', url: '/notes', payload })
  t.equal((await post({ note: '' })).statusCode, 400)
  t.equal(app.db.snapshot().totals.checkouts, 0)
  const answer = await post({ note: 'typed' })
  t.equal(answer.statusCode, 201)
  t.strictSame(answer.json(), { note: 'typed' }, 'the id is not in the schema')
  t.strictSame(await notesIn(database), ['typed'])
})

test('JSON schema: the same', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    const body = {
      type: 'object',
      required: ['note'],
      properties: { note: { type: 'string', minLength: 1 } },
    } as const
    app.withTypeProvider<JsonSchemaToTsProvider>().post('/notes', { schema: { body } }, async ({ db, body }) => {
      const text: string = body.note
      return db.insertInto('notes').values({ note: text }).returning('note').executeTakeFirstOrThrow()
    })
  })
  const post = (payload: object) => app.inject({ method: 'POST', url: '/notes', payload })
  t.equal((await post({})).statusCode, 400)
  t.equal(app.db.snapshot().totals.checkouts, 0)
  t.strictSame((await post({ note: 'typed' })).json(), { note: 'typed' })
})
