import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { promisify } from 'node:util'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { compile } from '../support/compiler.ts'
import { createDatabase } from '../support/database.ts'
import { blocksOf, projectOf } from '../support/document.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { watchApp } from '../support/nothing-left.ts'
import { buildReplicatedApp } from '../support/replicated-app.ts'
import { ownServer } from '../support/server.ts'
import { standbyOf } from '../support/standby.ts'
import { type Test, t, test } from '../support/test.ts'

const TRIPS = 'create table trips (id serial primary key, note text not null)'
const server = await ownServer(t)
const standby = await standbyOf(t, server, { flags: ['max_standby_streaming_delay=100ms'] })
const database = await createDatabase(t, { sql: TRIPS, server })
const urls = { DATABASE_URL: database.connectionString, REPLICA_URL: standby.urlOf(database) }
const WITHIN = { withinMillis: 30_000 }
const blocks = await blocksOf('docs/replica.md')

t.beforeEach(async () => {
  await standby.start()
  await standby.resumeReplay()
  await database.query('truncate trips restart identity')
  await standby.caughtUp()
})

/** The app of the document itself, without its last block, which tries it out; loaded anew for each test. */
let loaded = 0
async function appOfTheDocument(t: Test): Promise<FastifyInstance> {
  const slow = `app.get('/slow', (request) => read(request, async (db) => {
    await sql\`select pg_sleep(case when pg_is_in_recovery() then 60 else 0 end) from trips\`.execute(db)
    return listTrips(db)
  }))`
  const module = [...blocks.slice(0, -1), slow, 'export { app }']
    .join('\n')
    .replace(/Fastify\(\{ logger.*\)/, 'Fastify()')
  const folder = await projectOf('replica-app', module)
  Object.assign(process.env, urls)
  const { app } = (await import(`${pathToFileURL(join(folder, 'example.ts')).href}?${++loaded}`)) as {
    app: FastifyInstance
  }
  t.teardown(() => app.close())
  await app.ready()
  watchApp(t, { database, application: 'none', snapshot: () => app.db.snapshot() })
  watchApp(t, { database, application: 'none', snapshot: () => app.replica.snapshot() })
  return app
}

async function book(app: FastifyInstance, note: string) {
  const answer = await app.inject({ method: 'POST', url: '/trips', body: { note } })
  return { status: answer.statusCode, headers: { 'x-wal-position': String(answer.headers['x-wal-position']) } }
}

const used = (app: FastifyInstance) => app.replica.snapshot().totals.checkouts

test('the document compiles and runs as it stands', async (t) => {
  const folder = await projectOf('replica', blocks.join('\n'))
  t.equal(await compile(folder), '')
  const { stdout, stderr } = await promisify(execFile)(process.execPath, ['--import=tsx', join(folder, 'example.ts')], {
    env: { ...process.env, ...urls },
  })
  t.equal(stdout, "201 [ { id: 1, note: 'to Lisbon' } ]\n")
  t.equal(stderr, '')
})

test('with replay paused, what was written is not read on the replica', async (t) => {
  const app = await appOfTheDocument(t)
  await standby.pauseReplay()
  t.equal((await book(app, 'x')).status, 201)
  t.strictSame((await app.inject('/archive')).json(), [])
  t.strictSame((await app.inject('/trips')).json(), [], 'nor by the route, unless it is told how far to wait')
  await standby.resumeReplay()
  await standby.caughtUp()
  t.match((await app.inject('/archive')).json(), [{ note: 'x' }])
})

test('told the position, it reads from the primary when the replica does not come that far in time', async (t) => {
  const app = await appOfTheDocument(t)
  await standby.pauseReplay()
  const { headers } = await book(app, 'x')
  const before = app.db.snapshot().totals.checkouts
  t.match((await app.inject({ url: '/trips', headers })).json(), [{ note: 'x' }])
  t.equal(app.db.snapshot().totals.checkouts, before + 1)
})

test('told the position, it reads from the replica when that comes so far in time', async (t) => {
  const app = await appOfTheDocument(t)
  const { headers } = await book(app, 'x')
  await standby.caughtUp()
  const before = app.db.snapshot().totals.checkouts
  t.match((await app.inject({ url: '/trips', headers })).json(), [{ note: 'x' }])
  t.equal(app.db.snapshot().totals.checkouts, before, 'not from the primary')

  await standby.pauseReplay()
  const late = (await book(app, 'y')).headers
  const from = used(app)
  const answer = app.inject({ url: '/trips', headers: late })
  await eventually(() => used(app) > from, WITHIN)
  await standby.resumeReplay()
  t.match((await answer).json(), [{ note: 'x' }, { note: 'y' }], 'while it waits')
})

test('every write is read by who wrote it, over many of them and with the replica as late as it is', async (t) => {
  const app = await appOfTheDocument(t)
  for (let i = 0; i < 50; i++) {
    const { headers } = await book(app, `n${i}`)
    const trips = (await app.inject({ url: '/trips', headers })).json<{ note: string }[]>()
    if (trips.at(-1)?.note !== `n${i}`) t.fail(`n${i} is not read`)
  }
  t.equal((await database.rows('trips')).length, 50)
})

test('a position that is none does no harm', async (t) => {
  const app = await appOfTheDocument(t)
  await book(app, 'x')
  for (const position of ["0/0'; drop table trips", 'FFFFFFFF/FFFFFFFF', '', '1/'])
    t.match((await app.inject({ url: '/trips', headers: { 'x-wal-position': position } })).json(), [{ note: 'x' }])
})

test('while the standby is down all is read from the primary, and from the replica when it is back', async (t) => {
  const app = await appOfTheDocument(t)
  const { headers } = await book(app, 'x')
  await standby.caughtUp()
  t.equal((await app.inject('/trips/count')).json(), 1)
  await standby.kill()
  for (let i = 0; i < 3; i++) {
    t.equal((await app.inject('/trips/count')).json(), 1)
    t.match((await app.inject('/trips')).json(), [{ note: 'x' }])
    t.match((await app.inject({ url: '/trips', headers })).json(), [{ note: 'x' }])
  }
  t.match(await app.inject('/archive'), { statusCode: 503 }, 'who says nothing else reads there only')
  t.match(app.replica.snapshot(), { open: 0 })
  await standby.start()
  await eventually(async () => (await app.inject('/archive')).statusCode === 200, WITHIN)
  const before = app.db.snapshot().totals.checkouts
  t.equal((await app.inject('/trips/count')).json(), 1)
  t.equal(app.db.snapshot().totals.checkouts, before)
})

for (const [what, disturb] of [
  ['cancelled for the replay (40001)', () => database.query('truncate trips')],
  ['cut by a crash of the standby', () => standby.kill()],
] as const) {
  test(`a read that is ${what} is repeated on the primary`, async (t) => {
    const app = await appOfTheDocument(t)
    await book(app, 'x')
    await standby.caughtUp()
    const answer = app.inject('/slow')
    const isAsleep = async () =>
      (await standby.backends(database)).some(({ query, state }) => state === 'active' && /pg_sleep/.test(query))
    await eventually(isAsleep, WITHIN)
    await disturb()
    const { statusCode, body } = await answer
    t.equal(statusCode, 200, body)
    t.strictSame(JSON.parse(body), await database.rows('trips'))
  })
}

test('a busy replica is not relieved by the primary', async (t) => {
  const app = await appOfTheDocument(t)
  const goOn = gate()
  const held = Array.from({ length: 10 }, () =>
    app.replica.session(async (replica) => {
      await sql`select 1`.execute(replica)
      await goOn.opened
    }),
  )
  await eventually(() => app.replica.snapshot().checkedOut === 10, WITHIN)
  t.match((await app.inject('/trips/count')).json(), { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
  goOn.open()
  await Promise.all(held)
})

test('remote_apply: COMMIT waits for the standby, and is unknown without it', async (t) => {
  await database.query("alter system set synchronous_standby_names = '*'")
  await database.query('select pg_reload_conf()')
  t.teardown(async () => {
    await database.query('alter system reset synchronous_standby_names')
    await database.query('select pg_reload_conf()')
  })
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
      await sql`set local synchronous_commit = remote_apply`.execute(db)
      await sql`insert into trips (note) values (${params.note})`.execute(db)
    })
    app.get('/', async ({ replica }) => (await sql`select note from trips order by id`.execute(replica)).rows)
  })
  const isSynchronous = async () =>
    (await database.query("select from pg_stat_replication where sync_state = 'sync'")).length === 1
  await eventually(isSynchronous, WITHIN)
  for (let i = 1; i <= 20; i++) {
    t.equal((await app.inject({ method: 'POST', url: `/n${i}` })).statusCode, 200)
    t.equal((await app.inject('/')).json<unknown[]>().length, i)
  }
  await standby.pauseReplay()
  const answer = await app.inject({ method: 'POST', url: '/late' })
  t.match(answer.json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  await standby.resumeReplay()
  await eventually(async () => (await app.inject('/')).json<unknown[]>().length === 21, WITHIN)
})
