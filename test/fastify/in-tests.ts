import { execFile } from 'node:child_process'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { createDatabase } from '../support/database.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* fastify.close() in the tests of an app: the process ends by itself. */

const database = await createDatabase(t, { sql: NOTES })
const folder = join(import.meta.dirname, '../../.tap/in-tests')
const env = { ...process.env, DATABASE_URL: database.connectionString }

const SCRIPTS = {
  'a request, and close': `
    const answer = await app.inject('/')
    if (answer.statusCode !== 200) throw new Error(answer.body)
    await app.close()`,
  'close twice, without a request': `
    await app.ready()
    await Promise.all([app.close(), app.close()])`,
  'close without ready': 'await app.close()',
  'node:test': `
    const { after, test } = await import('node:test')
    const assert = await import('node:assert')
    after(() => app.close())
    test('answers', async () => assert.equal((await app.inject('/')).statusCode, 200))`,
}

for (const [name, script] of Object.entries(SCRIPTS)) {
  test(`${name}: nothing keeps the process alive`, async (t) => {
    await mkdir(folder, { recursive: true })
    const file = join(folder, `${name.replace(/\W+/g, '-')}.ts`)
    await writeFile(
      file,
      `import Fastify from 'fastify'
      import requestDb from '../../lib/index.ts'
      const app = Fastify()
      await app.register(requestDb, { connectionString: process.env.DATABASE_URL })
      app.get('/', ({ db }) => (db as any).selectFrom('notes').selectAll().execute())
      ${script}`,
    )
    await promisify(execFile)(process.execPath, ['--import=tsx', file], { env, timeout: 60_000 })
    t.strictSame(await database.backends(), [])
  })
}
