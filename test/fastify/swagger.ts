import swagger from '@fastify/swagger'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { add } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* @fastify/swagger: routes with options of ours are documented like any other. */

const database = await createDatabase(t, { sql: NOTES })

test('the document has the routes, and making it opens no session', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    await app.register(swagger, { openapi: { info: { title: 'notes', version: '1' } } })
    app.post(
      '/notes/:id',
      {
        schema: { summary: 'writes', params: { type: 'object', properties: { id: { type: 'integer' } } } },
        config: { db: { retry: {} } },
      },
      async ({ db }) => add(db, 'x').then(() => 'ok'),
    )
    app.get('/openapi.json', async () => app.swagger())
  })
  const document = (await app.inject('/openapi.json')).json()
  t.equal(document.paths['/notes/{id}'].post.summary, 'writes')
  t.equal(app.db.snapshot().totals.checkouts, 0)
  t.equal((await app.inject({ method: 'POST', url: '/notes/1' })).statusCode, 200)
})
