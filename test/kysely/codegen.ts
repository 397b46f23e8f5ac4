import { execFile } from 'node:child_process'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { createDatabase } from '../support/database.ts'
import { t, test } from '../support/test.ts'
import { ZOO } from '../support/zoo.ts'

/* DatabaseSchema from the database itself, by kysely-codegen. */

const database = await createDatabase(t, { sql: ZOO })
const root = join(import.meta.dirname, '../..')
const folder = join(root, '.tap', 'codegen')
const run = promisify(execFile)

const APP = `
import Fastify from 'fastify'
import requestDb from 'fastify-request-db'
import type { DB } from './database.ts'

declare module 'fastify-request-db' {
  interface DatabaseSchema extends DB {}
}

const app = Fastify()
await app.register(requestDb, { connectionString: 'postgres://' })
app.get('/', async ({ db }) => {
  const { name, born } = await db.selectFrom('people').select(['name', 'born']).executeTakeFirstOrThrow()
  const text: string = name
  const year: number | null = born
  await db.insertInto('pets').values({ name: text, species: 'cat' }).execute()
  // @ts-expect-error a column that is not there
  await db.selectFrom('people').select('age').execute()
  return { text, year }
})
`
const TSCONFIG = {
  compilerOptions: {
    strict: true,
    target: 'es2023',
    module: 'nodenext',
    noEmit: true,
    skipLibCheck: true,
    types: ['node'],
    allowImportingTsExtensions: true,
  },
  files: ['app.ts'],
}

test('the types that kysely-codegen writes are a DatabaseSchema', async (t) => {
  await rm(folder, { recursive: true, force: true })
  await mkdir(folder, { recursive: true })
  const out = join(folder, 'database.ts')
  const cli = join(root, 'node_modules/.bin/kysely-codegen')
  await run(cli, ['--dialect', 'postgres', '--url', database.connectionString, '--out-file', out], { cwd: folder })
  await writeFile(join(folder, 'app.ts'), APP)
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify(TSCONFIG))
  const tsc = join(root, 'node_modules/.bin/tsc')
  const { stdout } = await run(tsc, ['-p', folder]).catch((error: { stdout: string }) => error)
  t.equal(stdout, '')
})
