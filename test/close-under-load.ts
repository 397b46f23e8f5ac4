import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { CommitOn } from '../lib/index.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { HttpClient } from './support/http-client.ts'
import { inBothModes } from './support/modes.ts'
import { notesIn } from './support/notebook.ts'
import { NOTES } from './support/schema.ts'
import { type Test, t } from './support/test.ts'

/* SIGTERM for a process whose clients do not stop: what was acknowledged is kept, and nothing else is. */
const database = await createDatabase(t, { sql: NOTES })
const SCRIPT = fileURLToPath(new URL('fixtures/sigterm-app.ts', import.meta.url))
const CLIENTS = 50

inBothModes(database, 'SIGTERM under load', async (t, commitOn) => {
  const { child, port } = await startApp(t, commitOn)
  const answered: string[] = []
  const refused: string[] = []
  const unanswered: string[] = []
  const loads = Array.from({ length: CLIENTS }, (_, client) => load(client))
  await eventually(() => answered.length > 200, { withinMillis: 20_000 })
  const since = performance.now()
  const exited = once(child, 'exit')
  child.kill('SIGTERM')
  t.strictSame(await exited, [0, null], 'it ends by itself')
  t.ok(performance.now() - since < 5000, `after ${Math.round(performance.now() - since)} ms`)
  await Promise.all(loads)
  const kept = new Set(await notesIn(database))
  t.strictSame(
    answered.filter((note) => !kept.has(note)),
    [],
    `all of ${answered.length} acknowledged writes are kept`,
  )
  for (const note of answered) kept.delete(note)
  t.strictSame([...kept], [], `none of ${refused.length} refused and ${unanswered.length} unanswered ones is`)
  await eventually(async () => (await database.backends()).length === 0)

  /** One client that sends the next as soon as it has the answer to the last, until there is nobody to send to. */
  async function load(client: number): Promise<void> {
    const connection = new HttpClient(port)
    t.teardown(() => connection.destroy())
    for (let n = 0; n < 10_000; n++) {
      const note = `${client}-${n}`
      const status = await connection
        .send('POST', `/${note}`)
        .response()
        .then((response) => response.status)
        .catch(() => undefined)
      if (status === 201) answered.push(note)
      else {
        const list = status === undefined ? unanswered : refused
        list.push(note)
        connection.destroy()
        return
      }
    }
  }
})

async function startApp(t: Test, commitOn: CommitOn): Promise<{ child: ChildProcess; port: number }> {
  const options = { connectionString: database.connectionString, commitOn, pool: { size: 4 } }
  const child = spawn(process.execPath, ['--import=tsx', SCRIPT, JSON.stringify(options)], {
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  })
  t.teardown(() => child.kill('SIGKILL'))
  const [{ port }] = (await once(child, 'message')) as [{ port: number }]
  return { child, port }
}
