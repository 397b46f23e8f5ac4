import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import { cancelOnServer } from '../../lib/pool/cancel.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, buildPooledApp } from '../support/pooled-app.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

/** One server connection behind PgBouncer, and a proxy between PgBouncer and the server. */
async function behind(t: Test, routes: (app: FastifyInstance) => unknown, settleTimeoutMillis = 5000) {
  const proxy = await startProxy(t, database.connectionString)
  const bouncer = await startPgBouncer(t, proxy.connectionString, { default_pool_size: 1 })
  const app = await buildPooledApp(t, database, bouncer, { pool: { size: 2 }, settleTimeoutMillis }, routes)
  return { app, proxy, bouncer }
}

const sleepers = (app: FastifyInstance) => {
  app.post('/sleep', async ({ db }) => {
    await add(db, 'undone')
    await sql`select pg_sleep(60)`.execute(db)
  })
  app.post('/next', async ({ db }) => void (await add(db, 'next')))
}
const isAsleep = async () => (await database.backends()).some(({ waitEvent }) => waitEvent === 'PgSleep')

bouncerTest(
  'a client leaves: its statement is cancelled through PgBouncer, and the next session is served',
  async (t) => {
    const { app, proxy } = await behind(t, sleepers)
    const client = await openHttp(t, app)
    client.send('POST', '/sleep')
    await eventually(isAsleep)
    client.destroy()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
    t.equal(proxy.cancels.length, 1)
    t.equal((await app.inject({ method: 'POST', url: '/next' })).statusCode, 200)
    t.strictSame(await notesIn(database), ['next'])
    t.equal((await database.backends()).length, 1, 'on the same server connection')
  },
)

bouncerTest(
  'PgBouncer keeps our cancel open until the server has taken it, and nobody gets that server before',
  async (t) => {
    const { app, proxy } = await behind(t, sleepers)
    const cancel = proxy.trap({ from: 'client', type: 'cancel' }, 'hold', { place: 'before' })
    const client = await openHttp(t, app)
    client.send('POST', '/sleep')
    await eventually(isAsleep)
    client.destroy()
    await cancel.sprung
    // The statement ends by itself while the cancel is on its way.
    const [backend] = await database.query<{ pid: number }>(
      "select pid from pg_stat_activity where query like 'select pg_sleep%'",
    )
    await database.query('select pg_cancel_backend($1)', [backend?.pid])
    await eventually(async () => !(await isAsleep()))
    const next = app.inject({ method: 'POST', url: '/next' })
    await eventually(() => app.db.snapshot().checkedOut === 2)
    t.strictSame(await notesIn(database), [])
    cancel.release()
    t.equal((await next).statusCode, 200)
    t.strictSame(await notesIn(database), ['next'])
  },
)

bouncerTest('a cancel of which nothing comes back costs the connection, and not the next session', async (t) => {
  const { app, proxy } = await behind(t, sleepers, 300)
  const cancel = proxy.trap({ from: 'client', type: 'cancel' }, 'hold', { place: 'before' })
  const client = await openHttp(t, app)
  client.send('POST', '/sleep')
  await eventually(isAsleep)
  client.destroy()
  await cancel.sprung
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
  cancel.release()
  t.equal((await app.inject({ method: 'POST', url: '/next' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['next'])
})

bouncerTest('a cancel for a client that has no server just then hits nobody', async (t) => {
  const asleep = gate()
  const { app, bouncer } = await behind(t, (app) => {
    app.get('/asleep', async ({ db }) => {
      asleep.open()
      await sql`select pg_sleep(0.5)`.execute(db)
      return 'slept'
    })
  })
  // Opens a client of PgBouncer's and leaves it idle.
  const idle = new pg.Client({ connectionString: bouncer.connectionString })
  t.teardown(() => idle.end())
  await idle.connect()
  await idle.query('select 1')
  const { processID: pid, secretKey } = idle as unknown as { processID: number; secretKey: number }
  const slept = app.inject('/asleep')
  await asleep.opened
  await eventually(isAsleep)
  const target = { host: '127.0.0.1', port: bouncer.port, ssl: false, sslNegotiation: 'postgres', stream: undefined }
  const certain = gate<boolean>()
  cancelOnServer({ ...target, pid, secretKey }, 5000, (is) => certain.open(is))
  await certain.opened
  t.equal((await slept).body, 'slept')
})
