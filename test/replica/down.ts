import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn } from '../support/notebook.ts'
import { buildReplicatedApp } from '../support/replicated-app.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { standbyOf } from '../support/standby.ts'
import { type Test, t, test } from '../support/test.ts'

const server = await ownServer(t)
const standby = await standbyOf(t, server)
const database = await createDatabase(t, { sql: NOTES, server })
const WITHIN = { withinMillis: 30_000 }
const UNAVAILABLE = { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' }
const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }

t.beforeEach(async () => {
  await standby.start()
  await database.query('truncate notes restart identity')
  await standby.caughtUp()
})

function routes(app: FastifyInstance): void {
  app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
    await add(db, params.note)
  })
  app.get('/', ({ replica }) => replica.selectFrom('notes').select('note').execute())
  app.get('/long', async ({ replica }) => {
    await sql`select pg_sleep(60)`.execute(replica)
  })
  app.post('/both/:note', async ({ db, replica, params }) => {
    await add(db, (params as { note: string }).note)
    return replica.selectFrom('notes').select('note').execute()
  })
}

async function setUp(t: Test) {
  const app = await buildReplicatedApp(t, database, standby, routes)
  const write = async (note: string) => (await app.inject({ method: 'POST', url: `/${note}` })).statusCode
  const answersAgain = () => eventually(async () => (await app.inject('/')).statusCode === 200, WITHIN)
  return { app, write, answersAgain }
}

const sleepers = async () =>
  (await standby.backends(database)).filter(({ query, state }) => state === 'active' && query.includes('pg_sleep'))

for (const [how, told] of [
  ['stop', 'stopped'],
  ['kill', 'killed'],
] as const) {
  test(`a standby that is ${told}: 503 for who reads from it, nothing for who does not, and it comes back`, async (t) => {
    const { app, write, answersAgain } = await setUp(t)
    t.equal((await app.inject('/')).statusCode, 200)
    await standby[how]()
    for (let i = 0; i < 3; i++) {
      const refused = await app.inject('/')
      t.equal(refused.statusCode, 503, refused.body)
      t.equal(await write(`n${i}`), 200)
    }
    t.match((await app.inject('/')).json(), UNAVAILABLE)
    t.match(app.replica.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
    t.match(app.db.snapshot(), { totals: { invalidated: 0 } })
    await standby.start()
    await standby.caughtUp()
    await answersAgain()
    t.strictSame((await app.inject('/')).json(), [{ note: 'n0' }, { note: 'n1' }, { note: 'n2' }])
  })
}

test('who uses both is refused, and what it wrote to the primary is rolled back', async (t) => {
  const { app, write } = await setUp(t)
  await standby.stop()
  t.match((await app.inject({ method: 'POST', url: '/both/x' })).json(), UNAVAILABLE)
  t.strictSame(await notesIn(database), [])
  t.equal(await write('y'), 200)
  t.strictSame(await notesIn(database), ['y'])
})

for (const [how, told] of [
  ['stop', 'stopped'],
  ['kill', 'killed'],
] as const) {
  test(`a read that runs while the standby is ${told} is CONNECTION_LOST, and nobody else`, async (t) => {
    const { app, write, answersAgain } = await setUp(t)
    const reading = app.inject('/long')
    await eventually(async () => (await sleepers()).length === 1, WITHIN)
    await standby[how]()
    t.match((await reading).json(), LOST)
    t.equal(await write('x'), 200)
    await standby.start()
    await answersAgain()
  })
}

test('a standby that lets nobody in yet (57P03) is UNAVAILABLE', async (t) => {
  const { app, write, answersAgain } = await setUp(t)
  await standby.stop()
  await standby.set('hot_standby = off')
  await standby.start()
  t.match((await app.inject('/')).json(), UNAVAILABLE)
  const reading = app.replica.session((replica) => replica.selectFrom('notes').selectAll().execute())
  await t.rejects(reading, { ...UNAVAILABLE, retryable: true, cause: { code: '57P03' } })
  t.equal(await write('x'), 200)
  await standby.stop()
  await standby.set('hot_standby = on')
  await standby.start()
  await answersAgain()
})

test('an app starts without its standby', async (t) => {
  await standby.stop()
  const { app, write, answersAgain } = await setUp(t)
  t.equal(await write('x'), 200)
  t.match((await app.inject('/')).json(), UNAVAILABLE)
  await standby.start()
  await standby.caughtUp()
  await answersAgain()
  t.strictSame((await app.inject('/')).json(), [{ note: 'x' }])
})

test('while the primary is down the replica is read, and writes are refused', async (t) => {
  const { app, write } = await setUp(t)
  t.equal(await write('x'), 200)
  await standby.caughtUp()
  await server.stop()
  t.equal(await write('y'), 503)
  t.strictSame((await app.inject('/')).json(), [{ note: 'x' }])
  await server.start()
  await eventually(async () => (await write('z')) === 200, WITHIN)
  await standby.caughtUp()
  t.strictSame((await app.inject('/')).json(), [{ note: 'x' }, { note: 'z' }])
})

// The last: it is nobody's standby any more.
test('a standby that is promoted under a read goes on, and still refuses writes', async (t) => {
  const asked = gate()
  const goOn = gate()
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    routes(app)
    app.get('/slow', async ({ replica }) => {
      await replica.selectFrom('notes').select('note').execute()
      asked.open()
      await goOn.opened
      return replica.selectFrom('notes').select('note').execute()
    })
    app.post('/replica', async ({ replica }) => {
      await add(replica, 'lost for everybody')
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/x' })).statusCode, 200)
  await standby.caughtUp()
  const slow = app.inject('/slow')
  await asked.opened
  await standby.promote()
  goOn.open()
  t.strictSame((await slow).json(), [{ note: 'x' }])
  t.match((await app.inject({ method: 'POST', url: '/replica' })).json(), { statusCode: 500, code: '25006' })
  t.equal((await app.inject({ method: 'POST', url: '/y' })).statusCode, 200)
  t.strictSame((await app.inject('/')).json(), [{ note: 'x' }], 'it does not follow any more')
  t.match(app.replica.snapshot(), { totals: { invalidated: 0 } })
})
