import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { AppProcessReport, AppProcessTask } from '../fixtures/app-process.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { HttpClient } from '../support/http-client.ts'
import { isAlive } from '../support/is-alive.ts'
import { notesIn } from '../support/notebook.ts'
import { watchPeak } from '../support/peak.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const SCRIPT = fileURLToPath(new URL('../fixtures/app-process.ts', import.meta.url))

/** Starts the app in a process of its own, and resolves when it and all its workers listen. */
async function startProcess(
  t: Test,
  task: AppProcessTask,
): Promise<{ child: ChildProcess; reports: AppProcessReport[]; stderr: () => string }> {
  const child = spawn(process.execPath, ['--import=tsx', SCRIPT, JSON.stringify(task)], {
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
  })
  let stderr = ''
  child.stderr?.on('data', (chunk) => {
    stderr += chunk
  })
  t.teardown(() => {
    if (child.connected) child.disconnect()
    if (task.workers === undefined) child.kill('SIGKILL')
  })
  const reports: AppProcessReport[] = []
  child.on('message', (report) => reports.push(report as AppProcessReport))
  await eventually(() => reports.length === (task.workers ?? 1) || child.exitCode !== null, { withinMillis: 20_000 })
  if (child.exitCode !== null) throw new Error(stderr)
  return { child, reports, stderr: () => stderr }
}

function named(connectionString: string, application: string): string {
  const url = new URL(connectionString)
  url.searchParams.set('application_name', application)
  return url.href
}

async function ask(t: Test, port: number, method: string, path: string, withinMillis = 10_000) {
  const client = new HttpClient(port)
  t.teardown(() => client.destroy())
  return await client.send(method, path, { headers: { connection: 'close' } }).response(withinMillis)
}

test('98 a process killed with -9 in a transaction leaves no lock and no row, and its successor serves', async (t) => {
  await database.query("insert into notes (note) values ('to lock')")
  const options = { connectionString: named(database.connectionString, 'killed') }
  const first = await startProcess(t, { options })
  new HttpClient(first.reports[0]!.port).send('POST', '/stuck/lost')
  const isLocked = async () =>
    (await database.query("select id from notes where note = 'to lock' for update skip locked")).length === 0
  await eventually(isLocked)
  first.child.kill('SIGKILL')
  const since = performance.now()
  await eventually(async () => !(await isLocked()) && (await database.backends('killed')).length === 0)
  t.ok(performance.now() - since < 1500)
  t.strictSame(await notesIn(database), ['to lock'])
  const second = await startProcess(t, { options })
  t.equal((await ask(t, second.reports[0]!.port, 'POST', '/kept')).status, 200)
  t.strictSame(await notesIn(database), ['to lock', 'kept'])
})

test('99 each worker of a cluster has a pool of its own, and the death of one is no harm to the other', async (t) => {
  const application = 'clustered'
  const options = {
    connectionString: named(database.connectionString, application),
    // It would be one connection more for a moment.
    capacityCheck: false,
    pool: { size: 2, maxOverflow: 1 },
  }
  const { reports } = await startProcess(t, { options, workers: 2 })
  const { port } = reports[0]!
  t.equal(reports[1]!.port, port)
  const peak = await watchPeak(t, database, application)
  const workers = new Set<string>()
  const kept: string[] = []
  let sent = 0
  const load = async (requests: number) => {
    for (let i = 0; i < requests; i++) {
      const note = `n${++sent}`
      // Who was with the dead worker gets no answer at all; whoever gets one gets a good one.
      const answer = await ask(t, port, 'POST', `/${note}`, 1500).catch(() => undefined)
      if (answer === undefined) continue
      if (answer.status !== 200) t.fail(answer.body)
      workers.add(answer.headers['x-worker']!)
      kept.push(note)
    }
  }
  await Promise.all(Array.from({ length: 10 }, () => load(15)))
  t.equal(workers.size, 2)
  const loads = Array.from({ length: 10 }, () => load(15))
  await eventually(() => sent > 200)
  process.kill(reports[0]!.pid, 'SIGKILL')
  await eventually(() => !isAlive(reports[0]!.pid))
  workers.clear()
  await Promise.all(loads)
  await load(5)
  t.ok(workers.has(String(reports[1]!.pid)))
  t.ok((await peak.stop()) <= 6, 'workers times size and overflow')
  const written = new Set(await notesIn(database))
  t.strictSame(
    kept.filter((note) => !written.has(note)),
    [],
  )
  await eventually(async () => (await database.backends(application)).length <= 3)
})

for (const open of [true, false]) {
  test(`a process ${open ? 'with half-open idle connections' : 'that never used the pool'} ends by itself after close()`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const { child, reports, stderr } = await startProcess(t, { options: { connectionString: proxy.connectionString } })
    if (open) {
      const { port } = reports[0]!
      const answers = await Promise.all([1, 2, 3].map(() => ask(t, port, 'GET', '/')))
      t.ok(answers.every(({ status }) => status === 200))
      proxy.swallow({ passesClose: false })
    }
    const since = performance.now()
    const exited = once(child, 'exit')
    child.send('close')
    t.strictSame(await exited, [0, null])
    t.ok(performance.now() - since < 3000, `after ${performance.now() - since} ms`)
    t.equal(stderr(), '')
  })
}
