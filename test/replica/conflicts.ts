import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { type Gate, gate } from '../support/gate.ts'
import { pidOf } from '../support/notebook.ts'
import { buildReplicatedApp } from '../support/replicated-app.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { standbyOf } from '../support/standby.ts'
import { type Test, t, test } from '../support/test.ts'

// What the standby has to replay does not wait for readers for long.
const server = await ownServer(t)
const standby = await standbyOf(t, server, { flags: ['max_standby_streaming_delay=100ms'] })
const database = await createDatabase(t, { sql: NOTES, server })
const WITHIN = { withinMillis: 30_000 }

t.beforeEach(async () => {
  await database.query("truncate notes; insert into notes (note) values ('x')")
  await standby.caughtUp()
})

/** Readers: one that asks for long, one that has asked and holds its transaction open until `goOn`. */
function readers(goOn: Gate, read: Gate): (app: FastifyInstance) => void {
  return (app) => {
    app.get('/', ({ replica }) => replica.selectFrom('notes').select('note').execute())
    app.get('/pid', ({ replica }) => pidOf(replica))
    app.get('/long', async ({ replica }) => {
      await sql`select note, pg_sleep(60) from notes`.execute(replica)
    })
    app.get('/idle', async ({ replica }) => {
      await replica.selectFrom('notes').select('note').execute()
      read.open()
      await goOn.opened
      return replica.selectFrom('notes').select('note').execute()
    })
  }
}

async function setUp(t: Test) {
  const goOn = gate()
  const read = gate()
  const app = await buildReplicatedApp(t, database, standby, readers(goOn, read), { pool: { size: 1 } })
  const isRunning = async () =>
    (await standby.backends(database)).some(({ query, state }) => state === 'active' && query.includes('pg_sleep'))
  return { app, goOn, read, isRunning }
}

for (const [what, change] of [
  ['a lock', 'truncate notes'],
  ['rows that are needed', 'delete from notes'],
] as const) {
  test(`a read in the way of ${what} is cancelled with 40001, and its connection serves on`, async (t) => {
    const { app, isRunning } = await setUp(t)
    const before = (await app.inject('/pid')).json()
    const reading = app.inject('/long')
    await eventually(isRunning, WITHIN)
    await database.query(change)
    await database.query('vacuum notes')
    t.match((await reading).json(), {
      statusCode: 500,
      code: '40001',
      message: 'canceling statement due to conflict with recovery',
    })
    await standby.caughtUp()
    t.equal((await app.inject('/pid')).json(), before)
    t.strictSame((await app.inject('/')).json(), [])
    t.match(app.replica.snapshot(), { open: 1, totals: { invalidated: 0 } })
  })
}

test('a session that is idle in its way is cut: CONNECTION_LOST, to be tried again', async (t) => {
  const { app, goOn, read } = await setUp(t)
  const idle = app.inject('/idle')
  await read.opened
  await database.query('truncate notes')
  await standby.caughtUp()
  goOn.open()
  t.match((await idle).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame((await app.inject('/')).json(), [])
})

test('what session() rejects with says whether to try again', async (t) => {
  const { app, isRunning } = await setUp(t)
  const opened = gate()
  const goOn = gate()
  const idle = app.replica.session(async (replica) => {
    await replica.selectFrom('notes').select('note').execute()
    opened.open()
    await goOn.opened
    await replica.selectFrom('notes').select('note').execute()
  })
  await opened.opened
  await database.query('truncate notes')
  await standby.caughtUp()
  goOn.open()
  await t.rejects(idle, { code: 'FST_REQUEST_DB_CONNECTION_LOST', retryable: true, cause: { code: '40001' } })
  await database.query("insert into notes (note) values ('x')")
  await standby.caughtUp()
  const long = app.replica.session((replica) => sql`select note, pg_sleep(60) from notes`.execute(replica))
  const rejected = t.rejects(long, { code: '40001', severity: 'ERROR' })
  await eventually(isRunning, WITHIN)
  await database.query('truncate notes')
  await rejected
})

test('a read on a standby that does not follow at once is left alone', async (t) => {
  const { app, goOn, read } = await setUp(t)
  const idle = app.inject('/idle')
  await read.opened
  await standby.pauseReplay()
  await database.query('truncate notes')
  goOn.open()
  t.strictSame((await idle).json(), [{ note: 'x' }])
  await standby.resumeReplay()
  await standby.caughtUp()
  t.strictSame((await app.inject('/')).json(), [])
})

test('the database that is dropped takes the readers of the standby along', async (t) => {
  const doomed = await createDatabase(t, { sql: NOTES, server })
  await standby.caughtUp()
  const app = await buildReplicatedApp(t, doomed, standby, readers(gate(), gate()), { pool: { size: 2 } })
  t.equal((await app.inject('/')).statusCode, 200)
  const reading = app.replica.session((replica) => sql`select pg_sleep(60)`.execute(replica))
  const rejected = t.rejects(reading, { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  await eventually(
    async () => (await standby.backends(doomed)).some(({ query, state }) => state === 'active' && /sleep/.test(query)),
    WITHIN,
  )
  const superuser = await database.client()
  await superuser.query(`drop database ${doomed.name} with (force)`)
  await rejected
  t.match((await app.inject('/')).json(), { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' })
})
