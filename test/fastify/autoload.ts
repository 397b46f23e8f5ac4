import { join } from 'node:path'
import autoload from '@fastify/autoload'
import Fastify from 'fastify'
import { createDatabase } from '../support/database.ts'
import { notesIn } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* @fastify/autoload: the plugin in one folder, the routes in another. */

const database = await createDatabase(t, { sql: NOTES })
// It looks for TypeScript's loaders in the command line, where ours is not always seen.
process.env.FASTIFY_AUTOLOAD_TYPESCRIPT = '1'
const folder = join(import.meta.dirname, 'fixtures/autoloaded')

test('autoloaded routes find the session of an autoloaded plugin, and their options count', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const { connectionString } = database
  const options = { connectionString }
  await app.register(autoload, { dir: join(folder, 'plugins'), options })
  await app.register(autoload, { dir: join(folder, 'routes') })
  const boats = await app.inject({ method: 'POST', url: '/boats' })
  t.strictSame(boats.json(), { route: 'boats' })
  const crews = await app.inject({ method: 'POST', url: '/crews' })
  t.equal(crews.json().code, '25006', 'it is read-only')
  t.strictSame(await notesIn(database), ['boat'])
  t.equal(app.db.snapshot().size, 2)
})
