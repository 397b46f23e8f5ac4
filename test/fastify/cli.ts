import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { notesIn } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* fastify-cli: the app as a plugin, started by somebody else. */

const database = await createDatabase(t, { sql: NOTES })
const cli = join(import.meta.dirname, '../../node_modules/fastify-cli/cli.js')
const fixture = join(import.meta.dirname, 'fixtures/started-by-cli.ts')
const env = { ...process.env, DATABASE_URL: database.connectionString }

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as { port: number }
  server.close()
  await once(server, 'close')
  return port
}

test('fastify start serves, and SIGTERM leaves nothing', async (t) => {
  const port = await freePort()
  const args = ['--import=tsx', cli, 'start', '--port', String(port), '--address', '127.0.0.1', fixture]
  const child = spawn(process.execPath, args, { env, stdio: 'ignore' })
  t.teardown(() => child.kill('SIGKILL'))
  const exited = once(child, 'exit')
  const post = async () => (await fetch(`http://127.0.0.1:${port}/notes`, { method: 'POST' })).status
  await eventually(async () => (await post().catch(() => 0)) === 200, { withinMillis: 30_000 })
  child.kill('SIGTERM')
  await exited
  await eventually(async () => (await database.backends()).length === 0, { withinMillis: 10_000 })
  t.strictSame(await notesIn(database), ['by the command line'])
})

test('fastify print-routes needs no database', async (t) => {
  const args = ['--import=tsx', cli, 'print-routes', fixture]
  const { stdout } = await promisify(execFile)(process.execPath, args, {
    env: { ...env, DATABASE_URL: 'postgres://nobody@127.0.0.1:1/nothing' },
  })
  t.match(stdout, /notes \(POST\)/)
})
