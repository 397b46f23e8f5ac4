import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import type { Report } from '../../lib/index.ts'
import { createDatabase, type Database } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { type Gate, gate } from '../support/gate.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { type PgBouncerSettings, startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, buildPooledApp, poolOf } from '../support/pooled-app.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t } from '../support/test.ts'

const SLOW_COMMIT = `
  create function takes_its_time() returns trigger language plpgsql as 'begin perform pg_sleep(60); return null; end';
  create constraint trigger slow after insert on notes deferrable initially deferred
    for each row when (new.note = 'slow') execute function takes_its_time()`

const database = await createDatabase(t, { sql: `${NOTES}; ${SLOW_COMMIT}` })
t.afterEach(async () => void (await database.query('delete from notes')))

interface Visit {
  readonly written: Gate
  readonly go: Gate
}

/** An app whose `POST /held` writes a note and waits in its transaction, and whose `POST /:note` only writes. */
async function bounced(t: Test, settings: PgBouncerSettings = {}, at: Database = database, size = 2) {
  const bouncer = await startPgBouncer(t, at.connectionString, settings)
  const visit: Visit = { written: gate(), go: gate() }
  const errors: (Error & { report?: Report })[] = []
  const app = await buildPooledApp(t, at, bouncer, { pool: { size } }, (app) => {
    app.post('/held', async ({ db }) => {
      await add(db, 'held')
      visit.written.open()
      await visit.go.opened
      await sql`select 1`.execute(db)
    })
    app.post('/:note', async ({ db, params }) => {
      await add(db, (params as { note: string }).note)
      return { pid: await pidOf(db) }
    })
    app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
  })
  return { bouncer, app, visit, errors, post: (path: string) => post(app, path) }
}

async function post(app: FastifyInstance, path: string) {
  const answer = await app.inject({ method: 'POST', url: path })
  const { code = '', pid = 0 } = answer.json<{ code?: string; pid?: number }>()
  return { status: answer.statusCode, code: code.replace('FST_REQUEST_DB_', ''), pid }
}

const causeOf = (error: Error | undefined) => (error?.cause as Error | undefined)?.message
const LOST = { status: 503, code: 'CONNECTION_LOST', pid: 0 }

bouncerTest('whoever finds no server connection is told after query_wait_timeout, once', async (t) => {
  const { app, visit, errors, post } = await bounced(t, { default_pool_size: 1, query_wait_timeout: 1 })
  const held = app.inject({ method: 'POST', url: '/held' })
  await visit.written.opened
  t.strictSame(await post('/refused'), LOST)
  t.equal(causeOf(errors[0]), 'query_wait_timeout')
  t.match(errors[0]?.report?.verdict, { cause: 'unreachable', sentence: /query_wait_timeout.*default_pool_size/ })
  t.equal(app.db.snapshot().totals.replays, 0)
  visit.go.open()
  t.equal((await held).statusCode, 200)
  t.equal((await post('/served')).status, 200)
  t.strictSame(await notesIn(database), ['held', 'served'])
})

bouncerTest('more clients than max_client_conn are refused, and the report says whose limit it is', async (t) => {
  const { app, visit, errors, post } = await bounced(t, { max_client_conn: 1 })
  const held = app.inject({ method: 'POST', url: '/held' })
  await visit.written.opened
  t.strictSame(await post('/refused'), { status: 503, code: 'UNAVAILABLE', pid: 0 })
  t.match(errors[0]?.report?.verdict, { cause: 'unreachable', sentence: /max_client_conn/ })
  visit.go.open()
  t.equal((await held).statusCode, 200)
  t.equal((await post('/served')).status, 200)
})

bouncerTest('a time limit of PgBouncer ends the session, and the report says so', async (t) => {
  const { visit, errors, post } = await bounced(t, { idle_transaction_timeout: 1 })
  const held = post('/held')
  await visit.written.opened
  await eventually(async () => (await database.backends()).every(({ state }) => state !== 'idle in transaction'), {
    withinMillis: 10_000,
  })
  visit.go.open()
  t.strictSame(await held, LOST)
  t.match(errors[0]?.report?.verdict?.sentence, /a time limit of PgBouncer/)
  t.strictSame(await notesIn(database), [])
  t.equal((await post('/served')).status, 200)
})

bouncerTest('PgBouncer does refuse the start-up parameters that the option refuses', async (t) => {
  const bouncer = await startPgBouncer(t, database.connectionString)
  for (const more of [
    { statement_timeout: 1000 },
    { lock_timeout: 1000 },
    { idle_in_transaction_session_timeout: 1000 },
    { options: '-c work_mem=8MB' },
  ]) {
    const client = new pg.Client({ connectionString: bouncer.connectionString, ...more })
    client.on('error', () => {})
    await t.rejects(client.connect(), { code: '08P01', message: /unsupported startup parameter/ })
    await client.end()
  }
})

bouncerTest('during PAUSE requests wait, and after RESUME they are served', async (t) => {
  const { bouncer, post } = await bounced(t)
  const { pid } = await post('/before')
  await bouncer.admin('PAUSE')
  const paused = post('/paused')
  await eventually(async () => Number((await poolOf(bouncer, database)).cl_waiting) === 1)
  t.strictSame(await notesIn(database), ['before'])
  await bouncer.admin('RESUME')
  const answer = await paused
  t.equal(answer.status, 200)
  t.not(answer.pid, pid, 'PAUSE has closed the server connection')
  t.strictSame(await notesIn(database), ['before', 'paused'])
})

bouncerTest(
  'after RECONNECT the next session has a new server connection, and the one under way keeps its own',
  async (t) => {
    const { bouncer, app, visit, post } = await bounced(t)
    const { pid } = await post('/before')
    const held = app.inject({ method: 'POST', url: '/held' })
    await visit.written.opened
    await bouncer.admin('RECONNECT')
    const { status, pid: after } = await post('/after')
    visit.go.open()
    t.equal((await held).statusCode, 200)
    t.equal(status, 200)
    t.not(after, pid)
    t.strictSame((await notesIn(database)).sort(), ['after', 'before', 'held'])
  },
)

for (const how of ['stop', 'kill'] as const) {
  bouncerTest(
    `PgBouncer ends (${how}): who was in a transaction gets 503, and once it is back all are served`,
    async (t) => {
      const { bouncer, app, visit, post } = await bounced(t)
      await Promise.all([post('/one'), post('/two')])
      const held = post('/held')
      await visit.written.opened
      await bouncer[how]()
      visit.go.open()
      t.strictSame(await held, LOST)
      t.strictSame(await post('/down'), { status: 503, code: 'UNAVAILABLE', pid: 0 })
      await bouncer.start()
      t.equal((await post('/back')).status, 200)
      t.strictSame((await notesIn(database)).sort(), ['back', 'one', 'two'])
      t.equal(app.db.snapshot().open, 1)
    },
  )
}

bouncerTest('PgBouncer ends while COMMIT runs: nobody knows, and nobody is told otherwise', async (t) => {
  const { bouncer, post } = await bounced(t)
  const slow = post('/slow')
  await eventually(async () =>
    (await database.backends()).some(({ query, state }) => query === 'COMMIT' && state === 'active'),
  )
  await bouncer.kill()
  t.strictSame(await slow, { status: 500, code: 'COMMIT_UNKNOWN', pid: 0 })
  await database.query(
    'select pg_terminate_backend(pid) from pg_stat_activity where query = $1 and pid <> pg_backend_pid()',
    ['COMMIT'],
  )
  await eventually(async () => (await database.backends()).length === 0)
})

bouncerTest('a backend is killed behind PgBouncer: 503, rolled back, and the next is served', async (t) => {
  const { visit, post } = await bounced(t, { default_pool_size: 1 })
  const held = post('/held')
  await visit.written.opened
  const [backend] = await database.backends()
  await database.query('select pg_terminate_backend($1, 5000)', [backend?.pid])
  visit.go.open()
  t.strictSame(await held, LOST)
  t.equal((await post('/next')).status, 200)
  t.strictSame(await notesIn(database), ['next'])
})

bouncerTest(
  'PostgreSQL restarts behind a PgBouncer that lives: 503 until it is back, then all are served',
  async (t) => {
    const server = await ownServer(t)
    const behind = await createDatabase(t, { sql: NOTES, server })
    const { visit, errors, post } = await bounced(t, { query_wait_timeout: 1 }, behind)
    await Promise.all([post('/one'), post('/two')])
    const held = post('/held')
    await visit.written.opened
    await server.stop()
    visit.go.open()
    t.strictSame(await held, LOST)
    t.strictSame(await post('/down'), LOST)
    t.match(errors.at(-1)?.report?.verdict?.sentence, /query_wait_timeout|server_login_retry/)
    await server.start()
    // Up to server_login_retry, and the first client who asks is told of the last failure.
    await eventually(async () => (await post('/back')).status === 200, { withinMillis: 10_000 })
    t.equal((await post('/after')).status, 200)
    t.strictSame((await notesIn(behind)).sort(), ['after', 'back', 'one', 'two'])
  },
)
