import { execFile } from 'node:child_process'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { pingChecks, pluginChecks, poolChecks, routeChecks, statementChecks } from '../lib/check-options.ts'
import * as errors from '../lib/errors.ts'
import { compile } from './support/compiler.ts'
import { createDatabase } from './support/database.ts'
import { t, test } from './support/test.ts'

const root = fileURLToPath(new URL('..', import.meta.url))
const readme = await readFile(join(root, 'README.md'), 'utf8')
const database = await createDatabase(t, {
  sql: 'create table trips (id serial primary key, note text not null); create table audit (url text, error text)',
})

/** First cells of the rows of the tables under a heading. */
function firstCells(heading: string): string[] {
  const section = readme.split(/^## /m).find((part) => part.startsWith(heading)) ?? ''
  return Array.from(section.matchAll(/^\| `([^`]+)`/gm), ([, name]) => name as string)
}

function codesOfTheTable(): string[] {
  return Object.values(errors).flatMap((value) => {
    if (typeof value !== 'function' || !value.prototype || !Object.hasOwn(value.prototype, 'retryable')) return []
    const made = new (value as unknown as new () => errors.RequestDbError)()
    return [made.code.replace('FST_REQUEST_DB_', '')]
  })
}

test('the README names every option and no other', async (t) => {
  const nested = new Set(['pool'])
  const names = [
    ...Object.keys(pluginChecks).filter((name) => !nested.has(name)),
    ...Object.keys(routeChecks),
    ...Object.keys(poolChecks).map((name) => `pool.${name}`),
    ...Object.keys(pingChecks).map((name) => `pool.prePing.${name}`),
    ...Object.keys(statementChecks).map((name) => `preparedStatements.${name}`),
  ]
  t.strictSame(firstCells('Options').sort(), [...new Set(names)].sort())
})

test('the README marks the options that a route has too', async (t) => {
  const marked = Array.from(readme.matchAll(/^\| `(\w+)` \*/gm), ([, name]) => name as string)
  t.strictSame(marked.sort(), Object.keys(routeChecks).sort())
})

test('the README names every error code and no other', async (t) => {
  t.strictSame(firstCells('Errors').sort(), codesOfTheTable().sort())
})

test('the README gives each error the status it has', async (t) => {
  for (const [, code, status] of readme.matchAll(/^\| `([A-Z_]+)` \| (\d{3}) \|/gm)) {
    const made = Object.values(errors)
      .filter((value) => typeof value === 'function' && value.prototype?.retryable !== undefined)
      .map((value) => new (value as unknown as new () => errors.RequestDbError)())
      .find((error) => error.code === `FST_REQUEST_DB_${code}`)
    t.equal(made?.statusCode, Number(status), `status of ${code}`)
  }
})

test('the README is between 150 and 300 lines', async (t) => {
  const lines = readme.trimEnd().split('\n').length
  t.ok(lines >= 150 && lines <= 300, `${lines} lines`)
})

test('the code of the README compiles against the built package, and runs', async (t) => {
  const blocks = Array.from(readme.matchAll(/^```ts\n([\s\S]*?)^```/gm), ([, code]) => code as string)
  t.equal(blocks.length, 2)
  const [example, audit] = blocks as [string, string]
  t.ok(
    example
      .trim()
      .split('\n')
      .filter((line) => line !== '').length <= 16,
    'the example is short',
  )
  // In the package's own folder, so that it finds itself by name, as a user's code would.
  const folder = join(root, '.tap', 'readme')
  await mkdir(folder, { recursive: true })
  const listening = 'await app.listen({ port: 3000 })\n'
  t.ok(example.endsWith(listening))
  const program = `${example.replace(listening, '')}${audit}
declare module 'fastify-request-db' { interface DatabaseSchema { audit: { url: string; error: string } } }
app.get('/fails', async () => { throw new Error('on purpose') })
const booked = await app.inject({ method: 'POST', url: '/trips', body: { note: 'to Lisbon' } })
const failed = await app.inject('/fails')
console.log(JSON.stringify([booked.statusCode, booked.json(), failed.statusCode]))
await app.close()
`
    .replace(/'postgres:\/\/[^']+'/, `'${database.connectionString}'`)
    .replace('{ logger: true }', '{}')
  await writeFile(join(folder, 'example.ts'), program)
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ extends: '../../tsconfig.json', include: ['*.ts'] }))

  const run = promisify(execFile)
  t.equal(await compile(folder), '')
  const { stdout } = await run(process.execPath, ['--import=tsx', join(folder, 'example.ts')], { cwd: root })
  t.strictSame(JSON.parse(stdout), [201, { id: 1, note: 'to Lisbon' }, 500])
  t.strictSame(await database.rows('audit'), [{ url: '/fails', error: 'Error: on purpose' }])
})
