import { channel, subscribe, unsubscribe } from 'node:diagnostics_channel'
import { sql } from 'kysely'
import { type Events, listen, type RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const NAMES = [
  'connect',
  'wait',
  'checkout',
  'checkin',
  'reset',
  'invalidate',
  'close',
  'begin',
  'statement-start',
  'statement',
  'commit',
  'rollback',
  'leak',
  'report',
] as const

type Told = { [Name in keyof Events]: { name: Name; event: Events[Name] } }[keyof Events]

/** An app with one route for each way to use a session, and all that is told of its pool. */
async function observed(t: Test, options: RequestDbOptions = {}) {
  const app = await buildApp(t, database, options, (app) => {
    app.get('/read', ({ db }) => db.selectFrom('notes').selectAll().execute())
    app.post('/add', async ({ db }) => {
      db.add(db.insertInto('notes').values({ note: 'kept' }))
      return 'ok'
    })
    app.post('/fails', async ({ db }) => {
      await db.insertInto('notes').values({ note: 'lost' }).execute()
      throw new Error('mine')
    })
    app.post('/undone', async ({ db }) => {
      await db.begin()
      await db.insertInto('notes').values({ note: 'lost' }).execute()
      await db.rollback()
      return 'ok'
    })
    app.get('/wrong', ({ db }) => sql`select ${'secret'} from nowhere`.execute(db))
    app.get('/unused', async ({ db }) => db.state)
  })
  const told: Told[] = []
  const tell = (name: keyof Events) => (event: unknown) => void told.push({ name, event } as Told)
  t.teardown(listen(app.db.pool, Object.fromEntries(NAMES.map((name) => [name, tell(name)]))))
  return { app, told, names: () => told.map(({ name }) => name) }
}

const find = <Name extends keyof Events>(told: readonly Told[], wanted: Name) =>
  told.flatMap(({ name, event }) => (name === wanted ? [event as Events[Name]] : []))

test('a request that reads is told of from check-out to check-in', async (t) => {
  const { app, told, names } = await observed(t)
  await app.inject('/read')
  t.strictSame(names(), ['statement-start', 'connect', 'wait', 'checkout', 'begin', 'statement', 'commit', 'checkin'])
  const who = { method: 'GET', route: '/read', requestId: 'req-1' }
  for (const { event } of told) t.equal(event.pool, app.db.pool)
  const [statement] = find(told, 'statement')
  t.equal(find(told, 'statement-start')[0], statement, 'one object for both')
  t.match(statement, { who, text: 'select * from "notes"', parameters: [], rowCount: 0, rows: [], error: undefined })
  t.ok(statement!.millis > 0)
  t.match(find(told, 'begin'), [{ who, text: 'BEGIN', isImplicit: true, pid: statement!.pid }])
  t.match(find(told, 'commit'), [{ who, error: undefined, pid: statement!.pid }])
  const [checkin] = find(told, 'checkin')
  t.match(checkin, { who, statements: 1, isHandedOver: false })
  t.ok(checkin!.heldMillis >= checkin!.busyMillis && checkin!.busyMillis > 0)
})

test('a second request finds the connection open, and waits for nothing', async (t) => {
  const { app, told, names } = await observed(t)
  await app.inject('/read')
  told.length = 0
  await app.inject('/read')
  t.strictSame(names(), ['statement-start', 'checkout', 'begin', 'statement', 'commit', 'checkin'])
  t.match(find(told, 'checkout'), [{ waitedMillis: 0, isHandedOver: false }])
})

test('a session that is never used is not told of', async (t) => {
  const { app, told } = await observed(t)
  t.equal((await app.inject('/unused')).body, 'idle')
  t.strictSame(told, [])
})

test('a deferred write is told of when it is added, and when it is through', async (t) => {
  const { app, told, names } = await observed(t)
  await app.inject('/read')
  told.length = 0
  await app.inject({ method: 'POST', url: '/add' })
  t.strictSame(names(), ['statement-start', 'checkout', 'begin', 'statement', 'commit', 'checkin'])
  t.match(find(told, 'statement'), [{ text: /^insert/, parameters: ['kept'], rowCount: 1, error: undefined }])
})

test('what a request leaves undone is reset; what the handler rolls back itself is not', async (t) => {
  const { app, told, names } = await observed(t)
  await app.inject('/read')
  told.length = 0
  await app.inject({ method: 'POST', url: '/fails' })
  await eventually(() => names().includes('checkin'))
  t.strictSame(names(), ['statement-start', 'checkout', 'begin', 'statement', 'reset', 'rollback', 'checkin'])
  told.length = 0
  await app.inject({ method: 'POST', url: '/undone' })
  t.strictSame(names(), ['checkout', 'begin', 'statement-start', 'statement', 'rollback', 'checkin'])
  t.match(find(told, 'begin'), [{ isImplicit: false }])
})

test('a statement that fails is told of with its error', async (t) => {
  const { app, told } = await observed(t)
  await app.inject('/wrong')
  t.match(find(told, 'statement'), [{ error: { code: '42P01' }, parameters: ['secret'], rows: undefined }])
})

test('a session that is handed a connection over, and one that is refused', async (t) => {
  const over = gate()
  const { app, told } = await observed(t, { pool: { size: 1, maxWaiting: 1 } })
  const held = app.db.session(async (db) => {
    await sql`select 1`.execute(db)
    await over.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  const second = app.inject('/read')
  await eventually(() => app.db.snapshot().waiting === 1)
  t.equal((await app.inject('/read')).statusCode, 503)
  over.open()
  await Promise.all([held, second])
  t.match(find(told, 'checkin')[0], { isHandedOver: true })
  t.match(find(told, 'checkout')[1], { isHandedOver: true, who: { route: '/read' } })
  t.ok(find(told, 'wait').some(({ outcome, who }) => outcome === 'granted' && who.route === '/read'))
  t.match(find(told, 'report'), [{ report: { code: 'FST_REQUEST_DB_POOL_SATURATED', waiting: 1 } }])
})

test('connections are told of when they open, fail to, die, and are closed', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { connectionString } = proxy
  const { app, told } = await observed(t, { connectionString, pool: { size: 1, maxOverflow: 1, recycleMillis: 1 } })
  await app.inject('/read')
  await eventually(() => find(told, 'close').length === 1)
  t.match(find(told, 'close'), [{ why: 'recycled', pid: find(told, 'connect')[0]!.pid }])
  proxy.failStartup('57P03', 1)
  await app.inject('/read')
  t.match(find(told, 'connect')[1], { pid: undefined, error: { code: '57P03' } })
  const trap = proxy.trap({ from: 'server', type: 'C', text: /SELECT/ }, 'reset')
  await app.inject('/read')
  await trap.sprung
  t.ok(find(told, 'invalidate')[0]?.error instanceof Error)
})

test('nothing is published where nobody listens, nor after somebody has stopped', async (t) => {
  for (const name of NAMES) t.equal(channel(`fastify-request-db:${name}`).hasSubscribers, false, name)
  const app = await buildApp(t, database)
  const heard: unknown[] = []
  const stop = listen(app.db.pool, { checkout: (event) => heard.push(event) })
  t.equal(channel('fastify-request-db:checkout').hasSubscribers, true)
  await app.db.session((db) => sql`select 1`.execute(db))
  stop()
  await app.db.session((db) => sql`select 1`.execute(db))
  t.equal(heard.length, 1)
  t.equal(channel('fastify-request-db:checkout').hasSubscribers, false)
})

test('who listens to one pool hears nothing of another', async (t) => {
  const [one, other] = [await buildApp(t, database), await buildApp(t, database)]
  const heard: unknown[] = []
  const all: unknown[] = []
  t.teardown(listen(one.db.pool, { checkout: (event) => heard.push(event) }))
  const hearAll = (event: unknown) => void all.push(event)
  subscribe('fastify-request-db:checkout', hearAll)
  t.teardown(() => void unsubscribe('fastify-request-db:checkout', hearAll))
  await other.db.session((db) => sql`select 1`.execute(db))
  t.equal(heard.length, 0)
  t.equal(all.length, 1)
})

test('Server-Timing says how long a request waited, held and was busy, where it is asked for', async (t) => {
  const { app } = await observed(t, { serverTiming: true })
  const { headers } = await app.inject('/read')
  t.match(headers['server-timing'], /^db-wait;dur=\d+\.\d, db-hold;dur=\d+\.\d, db-busy;dur=\d+\.\d$/)
  t.notOk('server-timing' in (await app.inject('/unused')).headers, 'no session, nothing to tell')
  t.match((await app.inject('/wrong')).headers, { 'server-timing': /db-hold/ }, 'of failures too')
  const off = await observed(t)
  t.notOk('server-timing' in (await off.app.inject('/read')).headers)
})
