import { execFile, fork } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { promisify } from 'node:util'
import type { FastifyInstance } from 'fastify'
import type { AppProcessReport } from './fixtures/app-process.ts'
import { compile } from './support/compiler.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { NOTES } from './support/schema.ts'
import { ownServer } from './support/server.ts'
import { t, test } from './support/test.ts'

// What docs/scaling.md says.

const root = fileURLToPath(new URL('..', import.meta.url))
const page = await readFile(join(root, 'docs', 'scaling.md'), 'utf8')
const block = (language: string) => new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, 'm').exec(page)?.[1] ?? ''
const WITHIN = { withinMillis: 60_000 }

t.setTimeout(180_000)

test('the plan is what the command prints', async (t) => {
  const [command, ...args] = block('sh').trim().split(' ').slice(1)
  t.equal(command, 'fastify-request-db')
  const bin = join(root, 'lib', 'bin.ts')
  const { stdout } = await promisify(execFile)(process.execPath, ['--import=tsx', bin, ...args], { cwd: root })
  t.equal(block('text'), stdout)
})

test('the code compiles, and its processes fit', async (t) => {
  const { connectionString } = await createDatabase(t)
  const folder = join(root, '.tap', 'scaling')
  await mkdir(folder, { recursive: true })
  await writeFile(join(folder, 'page.ts'), `${block('ts')}\nexport { app }\n`)
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ extends: '../../tsconfig.json', include: ['*.ts'] }))
  t.equal(await compile(folder), '')
  process.env.DATABASE_URL = connectionString
  const { app } = (await import(pathToFileURL(join(folder, 'page.ts')).href)) as { app: FastifyInstance }
  await app.ready()
  t.ok((await app.db.ping()) > 0)
  t.match(app.db.snapshot(), { size: 5, maxOverflow: 2 })
  await app.close()
})

test('a statement whose process was killed ends, where the server looks whether anybody still waits', async (t) => {
  const server = await ownServer(t)
  const database = await createDatabase(t, { server, sql: NOTES })
  await database.query(block('sql').replace('5s', '100ms'))
  const options = { connectionString: `${database.connectionString}?application_name=killed`, capacityCheck: false }
  const script = fileURLToPath(new URL('fixtures/app-process.ts', import.meta.url))
  const child = fork(script, [JSON.stringify({ options })], { cwd: root, execArgv: ['--import=tsx'] })
  t.teardown(() => child.kill('SIGKILL'))
  const [{ port }] = (await once(child, 'message')) as [AppProcessReport]

  const lock = await database.client()
  await lock.query('begin; lock table notes')
  const answer = fetch(`http://127.0.0.1:${port}/late`, { method: 'POST' }).then(
    ({ status }) => status,
    () => 'none',
  )
  const waiting = async () => (await database.backends('killed')).filter(({ waitEvent }) => waitEvent === 'relation')
  await eventually(async () => (await waiting()).length === 1, WITHIN)
  child.kill('SIGKILL')
  await eventually(async () => (await database.backends('killed')).length === 0, WITHIN)
  t.equal(await answer, 'none')
  await lock.query('commit')
  t.strictSame(await database.rows('notes'), [])
})
