import pg from 'pg'
import { Connection } from '../../lib/pool/connection.ts'
import { UNNAMED } from '../../lib/pool/statements.ts'
import { takeClock } from '../support/clock.ts'
import { freePort } from '../support/cluster.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { asking, fly, openConnection, rowsOf } from '../support/open-connection.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

const NOBODY = { asked() {}, answered() {} }

const database = await createDatabase(t, { sql: NOTES })

async function setUp(t: Test) {
  const proxy = await startProxy(t, database.connectionString)
  const connection = await openConnection(t, { connectionString: proxy.connectionString })
  const deaths: Error[] = []
  connection.onDeath = (death) => deaths.push(death)
  return { proxy, connection, deaths }
}
const ping = (connection: Connection, timeoutMillis = 5000) =>
  new Promise<boolean>((resolve) => connection.ping(timeoutMillis, resolve))
const takeBack = (connection: Connection) => new Promise((resolve) => connection.takeBack(resolve))

t.test('opens, knows its backend, and is quiet', async (t) => {
  const { connection } = await setUp(t)
  t.strictSame(await rowsOf(connection, 'select pg_backend_pid() as pid'), [{ pid: connection.pid }])
  t.equal(connection.quiet, true)
  t.equal(connection.status, 'I')
  t.equal(connection.death, undefined)
  t.equal(connection.killed, false)
})

t.test('is told of as fit for use in the very moment it is opened', async (t) => {
  await new Promise<void>((resolve, reject) => {
    Connection.open(
      { connectionString: database.connectionString },
      UNNAMED,
      Number.POSITIVE_INFINITY,
      (error, opened) => {
        if (error) return reject(error)
        t.equal(opened!.quiet, true)
        t.equal(opened!.status, 'I')
        t.teardown(() => opened!.destroy())
        resolve()
      },
    )
  })
})

t.test('an attempt that fails is told once, and later', async (t) => {
  const calls: unknown[] = []
  Connection.open({ host: '127.0.0.1', port: await freePort(), user: 'u', database: 'd' }, UNNAMED, 0, (...call) =>
    calls.push(call),
  )
  t.strictSame(calls, [], 'never before open() returns')
  await eventually(() => calls.length > 0)
  t.match(calls, [[{ code: 'ECONNREFUSED' }]])
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(calls.length, 1)
})

t.test('an attempt that throws on the spot is told like any other', async (t) => {
  const calls: unknown[] = []
  const config = { host: '127.0.0.1', port: 99_999_999, user: 'u', database: 'd' }
  t.doesNotThrow(() => Connection.open(config, UNNAMED, 0, (...call) => calls.push(call)))
  t.strictSame(calls, [])
  await eventually(() => calls.length > 0)
  t.match(calls, [[Error]])
})

t.test('an attempt can be given up, also twice', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.silenceStartup()
  const calls: unknown[] = []
  const giveUp = Connection.open({ connectionString: proxy.connectionString }, UNNAMED, 0, (...call) =>
    calls.push(call),
  )
  await eventually(() => proxy.recordings.length === 1)
  giveUp()
  giveUp()
  await eventually(() => calls.length === 1 && proxy.recordings[0]?.closed === true)
  t.match(calls, [[Error]])
})

t.test('grows old by the monotonic clock', async (t) => {
  const clock = takeClock(t)
  const connection = await openConnection(
    t,
    { connectionString: database.connectionString },
    performance.now() + 60_000,
  )
  t.equal(connection.expired, false)
  clock.advance(61_000)
  t.equal(connection.expired, true)
})

t.test('is not quiet while something is under way', async (t) => {
  const { connection } = await setUp(t)
  const both = [fly(connection, asking('select 1')), fly(connection, asking('begin'))]
  t.equal(connection.quiet, false)
  await Promise.all(both)
  t.equal(connection.quiet, true)
  t.equal(connection.status, 'T')
})

t.test('a ping is answered, or the connection is dead', async (t) => {
  const { proxy, connection, deaths } = await setUp(t)
  t.equal(await ping(connection), true)
  proxy.swallow()
  const since = performance.now()
  t.equal(await ping(connection, 150), false)
  const after = performance.now() - since
  t.ok(after >= 145 && after < 1000, `after ${after} ms`)
  t.match(deaths, [{ message: /ping within 150 ms/ }])
  t.equal(connection.killed, true)
  t.equal(connection.death, deaths[0])
  t.equal(await ping(connection), false, 'and stays it')
  await eventually(() => proxy.sessions[0]?.closed === true)
})

t.test('says goodbye when it is closed, and is done when the server has hung up', async (t) => {
  const { proxy, connection, deaths } = await setUp(t)
  await new Promise<void>((resolve) => connection.close(resolve))
  t.match(connection.death, { message: /closed/ })
  t.strictSame(deaths, [], 'it was asked to')
  t.equal(proxy.sessions[0]?.terminated, true)
  await eventually(async () => (await database.backends()).length === 0)
})

t.test('does not wait for ever for a server that does not hang up', async (t) => {
  const { proxy, connection } = await setUp(t)
  proxy.swallow()
  const since = performance.now()
  await new Promise<void>((resolve) => connection.close(resolve))
  t.ok(performance.now() - since < 1500)
  await eventually(() => proxy.sessions[0]?.closed === true)
})

t.test('what is under way when it is killed is lost, first to last, and then it is told once', async (t) => {
  const { connection, deaths } = await setUp(t)
  const order: string[] = []
  connection.onDeath = () => order.push('death')
  const lost = ['first', 'second', 'third'].map(async (name) => {
    const landing = await fly(connection, asking('select pg_sleep(30)'))
    t.match(landing, { death: { message: 'enough' }, reached: true })
    return name
  })
  for (const name of ['first', 'second']) {
    connection.send([], { flightLanded: () => {}, flightLost: () => order.push(name) })
  }
  connection.kill(new Error('enough'))
  connection.kill(new Error('again'))
  await Promise.all(lost)
  t.strictSame(order, ['first', 'second', 'death'])
  t.strictSame(deaths, [])
  t.match(connection, { killed: true, quiet: true, death: { message: 'enough' } })
})

t.test('when it is destroyed nobody is told', async (t) => {
  const { connection, deaths } = await setUp(t)
  connection.destroy()
  t.strictSame(deaths, [])
  t.ok(connection.death)
  t.equal(connection.killed, false)
  await eventually(async () => (await database.backends()).length === 0)
})

t.test('what is sent on a dead one is lost, and has surely not reached the server', async (t) => {
  const { connection } = await setUp(t)
  connection.destroy()
  t.match(await fly(connection, asking('select 1')), { reached: false, death: connection.death })
})

t.test('where the server says goodbye in the middle of a flight, it has not begun the next', async (t) => {
  const { connection, deaths } = await setUp(t)
  const flights = [
    fly(connection, asking('select 1 as i')),
    fly(connection, asking('select pg_terminate_backend(pg_backend_pid()), pg_sleep(5)')),
    fly(connection, asking("insert into notes (note) values ('never')")),
  ]
  const [done, killed, next] = await Promise.all(flights)
  t.match(done, { status: 'I' })
  t.match(killed, { reached: true, death: { code: '57P01' } })
  t.match(next, { reached: false, death: { code: '57P01' } })
  t.match(deaths, [{ code: '57P01' }])
  t.equal(connection.killed, false)
  t.strictSame(await database.rows('notes'), [])
})

t.test('where the socket breaks, everything under way may have been done', async (t) => {
  const { proxy, connection, deaths } = await setUp(t)
  const flights = [fly(connection, asking('select pg_sleep(30)')), fly(connection, asking('select 1'))]
  await eventually(() => proxy.flights.length === 2)
  proxy.cut('reset')
  for (const landing of await Promise.all(flights)) t.match(landing, { reached: true, death: Error })
  t.equal(deaths.length, 1)
})

t.test('dies once, however many errors pg reports', async (t) => {
  const { connection, deaths } = await setUp(t)
  await database.query('select pg_terminate_backend($1, 5000)', [connection.pid])
  await eventually(() => deaths.length > 0)
  for (let turns = 0; turns < 20; turns++) await new Promise((resolve) => setImmediate(resolve))
  t.match(deaths, [{ code: '57P01' }])
  t.equal(deaths.length, 1)
})

t.test('is lent as pg’s own client, and taken back with the server’s word', async (t) => {
  const { connection } = await setUp(t)
  const client = connection.lend(NOBODY)
  t.ok(client instanceof pg.Client)
  t.match((await client.query('select 1 as a; select 2 as b')) as unknown, [{ rows: [{ a: 1 }] }, { rows: [{ b: 2 }] }])
  await client.query('begin')
  t.equal(await takeBack(connection), 'T')
  t.strictSame(await rowsOf(connection, 'select 1 as i'), [{ i: 1 }])
  t.throws(() => client.query('select 1'), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
})

t.test('what the borrower left under way comes first, failed or not', async (t) => {
  const { connection } = await setUp(t)
  for (const { text, outcome, status } of [
    { text: 'select pg_sleep(0.02)', outcome: 'SELECT', status: 'I' },
    { text: 'select 1/0', outcome: '22012', status: 'I' },
    { text: 'begin', outcome: 'BEGIN', status: 'T' },
    { text: 'select nonsense', outcome: '42703', status: 'E' },
    { text: 'rollback', outcome: 'ROLLBACK', status: 'I' },
  ]) {
    const client = connection.lend(NOBODY)
    const left = client.query(text).then(
      ({ command }) => command,
      ({ code }) => code,
    )
    t.equal(await takeBack(connection), status)
    t.equal(await left, outcome)
  }
  const many = await Promise.all(Array.from({ length: 10 }, (_, i) => rowsOf(connection, `select ${i} as i`)))
  t.strictSame(
    many,
    Array.from({ length: 10 }, (_, i) => [{ i }]),
    'the pipeline is in step',
  )
})

t.test('a connection that dies while it is lent is not taken back', async (t) => {
  const { connection, deaths } = await setUp(t)
  const client = connection.lend(NOBODY)
  await t.rejects(client.query('select pg_terminate_backend(pg_backend_pid()), pg_sleep(5)'))
  await eventually(() => deaths.length === 1)
  t.equal(await takeBack(connection), undefined)
})

t.test('has the server stop what it runs', async (t) => {
  const { proxy, connection } = await setUp(t)
  const sleeping = fly(connection, asking('select pg_sleep(30)'))
  await eventually(async () =>
    (await database.backends()).some(({ pid, waitEvent }) => pid === connection.pid && waitEvent === 'PgSleep'),
  )
  t.equal(await new Promise((resolve) => connection.cancel(5000, resolve)), true)
  t.match((await sleeping).flight.error, { code: '57014' })
  t.strictSame(proxy.cancels, [connection.pid])
})
