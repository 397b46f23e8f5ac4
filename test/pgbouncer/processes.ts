import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { PooledReport, PooledTask } from '../fixtures/pooled-process.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { notesIn } from '../support/notebook.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, poolOf } from '../support/pooled-app.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

const PROCESSES = 8
const SIZE = 20
const SERVERS = 20
const REQUESTS = 150

const database = await createDatabase(t, { sql: NOTES })
const SCRIPT = fileURLToPath(new URL('../fixtures/pooled-process.ts', import.meta.url))

/** A role that PostgreSQL itself allows no more than so many connections, and its connection string. */
async function limitedUser(): Promise<string> {
  const role = await database.role(`login password 'limited' connection limit ${SERVERS}`)
  await database.query(`grant select, insert on notes to ${role}`)
  const url = new URL(database.connectionString)
  url.username = role
  url.password = 'limited'
  return url.href
}

function start(t: Test, task: PooledTask) {
  const child = spawn(process.execPath, ['--import=tsx', SCRIPT, JSON.stringify(task)], {
    stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
  })
  let stderr = ''
  child.stderr?.on('data', (chunk) => {
    stderr += chunk
  })
  t.teardown(() => child.kill('SIGKILL'))
  return { child, stderr: () => stderr }
}

async function nextMessage(child: ChildProcess): Promise<unknown> {
  const [message] = await Promise.race([
    once(child, 'message'),
    once(child, 'exit').then(([code]) => Promise.reject(new Error(`A process ended with ${code}`))),
  ])
  return message
}

bouncerTest(
  `${PROCESSES} processes of ${SIZE} connections each work on ${SERVERS} connections of the server`,
  async (t) => {
    const user = await limitedUser()
    const bouncer = await startPgBouncer(t, user, {
      default_pool_size: SERVERS,
      max_client_conn: PROCESSES * SIZE + 10,
      query_wait_timeout: 60,
      admin_users: new URL(user).username,
    })
    const options = {
      connectionString: bouncer.connectionString,
      pooler: 'transaction' as const,
      pool: { size: SIZE, timeoutMillis: 60_000 },
      processes: PROCESSES,
    }
    const processes = Array.from({ length: PROCESSES }, (_, index) =>
      start(t, { name: `p${index}`, options, requests: REQUESTS, atATime: 2 * SIZE }),
    )
    await Promise.all(processes.map(({ child }) => nextMessage(child)))

    let peak = 0
    let isOver = false
    const watched = (async () => {
      while (!isOver) peak = Math.max(peak, (await database.backends()).length)
    })()
    const answers = processes.map(({ child }) => nextMessage(child))
    for (const { child } of processes) child.send('go')
    const reports = (await Promise.all(answers)) as PooledReport[]
    isOver = true
    await watched

    t.strictSame(
      reports.flatMap(({ wrong }) => wrong),
      [],
      'every answer is right',
    )
    t.strictSame(
      (await notesIn(database)).sort(),
      reports.flatMap(({ kept }) => kept).sort(),
      'no row is lost or doubled',
    )
    t.equal(reports.flatMap(({ kept }) => kept).length, (PROCESSES * REQUESTS * 4) / 5)
    for (const report of reports) t.match(report, { open: SIZE, handOvers: 0 })
    const pool = await poolOf(bouncer, database)
    t.equal(
      Number(pool.cl_active) + Number(pool.cl_waiting),
      PROCESSES * SIZE,
      'all of the pools are clients of PgBouncer',
    )
    t.ok(peak > SERVERS / 2 && peak <= SERVERS, `at most ${peak} backends`)

    const ended = processes.map(({ child }) => once(child, 'exit'))
    for (const { child } of processes) child.send('close')
    t.strictSame(
      await Promise.all(ended),
      processes.map(() => [0, null]),
    )
    t.strictSame(
      processes.map(({ stderr }) => stderr()),
      processes.map(() => ''),
    )
    await eventually(async () => Number((await poolOf(bouncer, database)).cl_active) === 0, { withinMillis: 10_000 })
    t.ok((await database.backends()).every(({ state }) => state === 'idle'))
    await bouncer.stop()
    await eventually(async () => (await database.backends()).length === 0, { withinMillis: 10_000 })
  },
)
