import { buildApp } from './app.ts'
import { createDatabase } from './database.ts'
import { pidOf } from './notebook.ts'
import { t, test } from './test.ts'
import { isThroughPooler } from './through-pooler.ts'

const database = await createDatabase(t)

test('the tests of the core go through PgBouncer where they are told to, and only there', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    app.get('/', async ({ db }) => {
      const backend = await pidOf(db)
      return { backend, announced: app.db.snapshot().holders[0]?.pid }
    })
  })
  const { backend, announced } = (await app.inject('/')).json()
  t.equal(backend !== announced, isThroughPooler, 'PgBouncer announces pids of its own')
})
