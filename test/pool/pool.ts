import { type LookupFunction, Socket } from 'node:net'
import { checkOptions } from '../../lib/check-options.ts'
import type { RequestDbOptions } from '../../lib/options.ts'
import { Pool } from '../../lib/pool/pool.ts'
import { takeClock } from '../support/clock.ts'
import { freePort } from '../support/cluster.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { asking, fly, rowsOf } from '../support/open-connection.ts'
import { startProxy } from '../support/proxy.ts'
import { type Test, t } from '../support/test.ts'
import { Visitor } from '../support/visitor.ts'

const database = await createDatabase(t)

async function setUp(t: Test, { pool: sizes, ...others }: RequestDbOptions = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const options = {
    connectionString: proxy.connectionString,
    pool: { size: 1, prePing: false as const, ...sizes },
    capacityCheck: false,
    ...others,
  }
  const pool = new Pool(checkOptions(options).pool)
  t.teardown(() => pool.close())
  let visitors = 0
  const visit = () => {
    const visitor = new Visitor(`v${++visitors}`)
    return { visitor, checkOut: pool.checkOut(visitor) }
  }
  /** Visits and has a connection. */
  const take = async () => {
    const { visitor } = visit()
    await eventually(() => visitor.loan !== undefined)
    return { visitor, loan: visitor.loan! }
  }
  return { proxy, pool, visit, take }
}

t.test('starts empty, opens on demand, and hands the same connection out again', async (t) => {
  const { proxy, pool, take } = await setUp(t)
  t.match(pool.snapshot(), { name: 'db', size: 1, maxOverflow: 0, open: 0, idle: 0, checkedOut: 0, waiting: 0 })
  const { loan } = await take()
  const { pid } = loan.connection
  t.match(pool.snapshot(), { open: 1, idle: 0, checkedOut: 1, holders: [{ route: 'v1', pid }] })
  loan.checkIn()
  loan.checkIn()
  t.match(pool.snapshot(), { open: 1, idle: 1, checkedOut: 0, holders: [], totals: { checkouts: 1, opened: 1 } })
  const again = await take()
  t.equal(again.loan.connection.pid, pid)
  again.loan.checkIn()
  t.equal(proxy.sessions.length, 1)
})

t.test('serves a visitor with an idle connection before checkOut() returns', async (t) => {
  const { take, visit } = await setUp(t)
  const { loan } = await take()
  loan.checkIn()
  t.strictSame(visit().visitor.told, ['granted'])
})

t.test('a second check-in does not give the connection of the next one away', async (t) => {
  const { pool, take, visit } = await setUp(t)
  const first = await take()
  first.loan.checkIn()
  const { visitor } = visit()
  first.loan.checkIn()
  t.equal(pool.snapshot().checkedOut, 1)
  t.strictSame(visit().visitor.told, [], 'there is one connection, and it is taken')
  visitor.loan!.checkIn()
})

for (const { state, texts } of [
  { state: 'in a transaction', texts: ['begin'] },
  { state: 'in a failed transaction', texts: ['begin', 'select 1/0'] },
]) {
  t.test(`a connection that comes back ${state} is destroyed`, async (t) => {
    const { pool, take, visit } = await setUp(t)
    const { loan } = await take()
    for (const text of texts) await fly(loan.connection, asking(text))
    const { visitor } = visit()
    loan.checkIn()
    await eventually(() => visitor.loan !== undefined)
    t.not(visitor.loan!.connection, loan.connection, 'who waits gets another')
    t.match(pool.snapshot().totals, { invalidated: 1, opened: 2 })
    visitor.loan!.checkIn()
  })
}

t.test('a connection that comes back busy is destroyed', async (t) => {
  const { pool, take } = await setUp(t)
  const { loan } = await take()
  void fly(loan.connection, asking('select pg_sleep(30)'))
  loan.checkIn()
  t.match(pool.snapshot(), { open: 0, totals: { invalidated: 1 } })
})

t.test('who holds a connection that dies is told once, after its slot is free', async (t) => {
  const { proxy, pool, take, visit } = await setUp(t)
  const { visitor, loan } = await take()
  const next = visit()
  proxy.cut('reset')
  await eventually(() => visitor.told.length === 2)
  t.match(visitor.told, ['granted', ['lost', /ECONNRESET|terminated/]])
  loan.checkIn()
  await eventually(() => next.visitor.loan !== undefined)
  t.match(pool.snapshot(), { open: 1, checkedOut: 1, totals: { invalidated: 1 } })
  next.visitor.loan!.checkIn()
})

t.test('an idle connection that dies is forgotten', async (t) => {
  const { proxy, pool, take } = await setUp(t)
  const { loan } = await take()
  loan.checkIn()
  proxy.cut('end')
  await eventually(() => pool.snapshot().open === 0)
  t.match(pool.snapshot(), { idle: 0, totals: { invalidated: 1 } })
})

t.test('who cannot have a connection is told why, and the next one tries anew', async (t) => {
  const { proxy, pool, take, visit } = await setUp(t)
  await proxy.refuse()
  const [one, next] = [visit(), visit()]
  await eventually(() => next.visitor.told.length > 0)
  t.strictSame([one.visitor.told, next.visitor.told], [['UNAVAILABLE'], ['UNAVAILABLE']])
  t.match(pool.snapshot(), { open: 0, waiting: 0, totals: { failedConnects: 2 } })
  await proxy.accept()
  const { loan } = await take()
  loan.checkIn()
})

t.test('the reason has a text where Node has none: refused on every address of a name', async (t) => {
  class TwoAddresses extends Socket {
    override connect(...[port]: unknown[]): this {
      const lookup: LookupFunction = (_name, _options, done) =>
        done(null, [
          { address: '127.0.0.1', family: 4 },
          { address: '127.0.0.2', family: 4 },
        ])
      return super.connect({ port: port as number, host: 'two.example', lookup, autoSelectFamily: true })
    }
  }
  const connection = {
    host: 'two.example',
    port: await freePort(),
    user: 'u',
    database: 'd',
    stream: () => new TwoAddresses(),
  }
  const pool = new Pool(checkOptions({ connection, capacityCheck: false }).pool)
  t.teardown(() => pool.close())
  const visitor = new Visitor('v')
  pool.checkOut(visitor)
  await eventually(() => visitor.told.length > 0)
  t.match(visitor.error?.cause, {
    message: /ECONNREFUSED 127\.0\.0\.1.*; .*ECONNREFUSED 127\.0\.0\.2/,
    cause: AggregateError,
  })
})

t.test('more than may wait, and who waits too long, are told so, and when to come back', async (t) => {
  const { pool, take, visit } = await setUp(t, { pool: { maxWaiting: 1, timeoutMillis: 50 } })
  const { loan } = await take()
  const [waiting, tooMany] = [visit(), visit()]
  t.strictSame(tooMany.visitor.told, ['POOL_SATURATED'])
  await eventually(() => waiting.visitor.told.length > 0)
  t.strictSame(waiting.visitor.told, ['POOL_TIMEOUT'])
  for (const { visitor } of [waiting, tooMany]) t.match(visitor.error, { headers: { 'retry-after': '1' } })
  t.match(pool.snapshot(), { waiting: 0, waiters: [], totals: { timeouts: 1, saturated: 1 } })
  loan.checkIn()
})

t.test('a connection that has grown old is replaced when it is next free, or next wanted', async (t) => {
  const clock = takeClock(t)
  const { pool, take } = await setUp(t, { pool: { size: 1, maxOverflow: 1, recycleMillis: 60_000 } })
  const [idle, used] = [await take(), await take()]
  idle.loan.checkIn()
  clock.advance(70_000)
  used.loan.checkIn()
  await eventually(() => pool.snapshot().totals.recycled === 1)
  const { loan } = await take()
  t.match(pool.snapshot(), { open: 1, totals: { opened: 3, recycled: 1, closed: 1 } })
  loan.checkIn()
  clock.advance(70_000)
  const again = await take()
  t.not(again.loan.connection, loan.connection)
  t.match(pool.snapshot(), { open: 1, totals: { opened: 4, recycled: 2 } })
  again.loan.checkIn()
})

t.test('a failed ping takes the idle ones along, and marks those in use', async (t) => {
  const clock = takeClock(t)
  const { proxy, pool, take } = await setUp(t, { pool: { size: 3, prePing: { timeoutMillis: 100 } } })
  const three = [await take(), await take(), await take()]
  three[0]!.loan.checkIn()
  three[1]!.loan.checkIn()
  proxy.swallow()
  clock.advance(2000)
  const { loan } = await take()
  t.match(pool.snapshot(), { open: 2, idle: 0, totals: { failedPings: 1, invalidated: 2, opened: 4 } })
  t.equal(three[2]!.loan.connection.expired, true)
  t.equal(loan.connection.expired, false)
  three[2]!.loan.checkIn()
  loan.checkIn()
  t.match(pool.snapshot(), { open: 1, idle: 1, totals: { recycled: 1 } })
})

t.test('who cancels is not called any more: in the queue, while connecting, while pinging', async (t) => {
  const clock = takeClock(t)
  const { proxy, pool, take, visit } = await setUp(t, { pool: { prePing: { idleMillis: 1000, timeoutMillis: 5000 } } })
  const startup = proxy.trap({ from: 'client', type: 'startup' }, 'hold')
  const connecting = visit()
  const queued = visit()
  await startup.sprung
  t.match(pool.snapshot(), { waiting: 1, waiters: [{ route: 'v1' }, { route: 'v2' }] })
  pool.cancel(connecting.checkOut)
  pool.cancel(queued.checkOut)
  pool.cancel(queued.checkOut)
  t.match(pool.snapshot(), { waiting: 0, waiters: [] })
  t.equal(pool.snapshot().waiters.length, 0)
  startup.release()
  await eventually(() => pool.snapshot().idle === 1)
  clock.advance(2000)
  const ping = proxy.trap({ from: 'client', type: 'S' }, 'hold')
  const pinging = visit()
  await ping.sprung
  pool.cancel(pinging.checkOut)
  ping.release()
  await eventually(() => pool.snapshot().idle === 1)
  for (const { visitor } of [connecting, queued, pinging]) t.strictSame(visitor.told, [])
  const { loan } = await take()
  loan.checkIn()
  t.match(pool.snapshot().totals, { checkouts: 1, opened: 1 })
})

t.test('a visitor that checks in within granted() is no trouble', async (t) => {
  const { pool, visit, take } = await setUp(t)
  const { loan } = await take()
  const visitors = Array.from({ length: 100 }, () => {
    const { visitor } = visit()
    visitor.onGranted = (loan) => loan.checkIn()
    return visitor
  })
  loan.checkIn()
  t.ok(visitors.every(({ told }) => told[0] === 'granted'))
  t.match(pool.snapshot(), { idle: 1, checkedOut: 0, waiting: 0, totals: { checkouts: 101, opened: 1 } })
})

t.test('the connection of a leaving holder goes straight to who waits, who may use it at once', async (t) => {
  const { proxy, take, visit } = await setUp(t, { pool: { prePing: { idleMillis: 0 } } })
  const { loan } = await take()
  const { visitor } = visit()
  proxy.clear()
  loan.checkIn()
  t.equal(visitor.loan?.connection, loan.connection)
  t.match(await rowsOf(visitor.loan!.connection, 'select 1 as i'), [{ i: 1 }])
  visitor.loan!.checkIn()
  t.equal(proxy.flights.length, 1, 'no ping')
})

t.test('the connections are named after the plugin, unless they have a name', async (t) => {
  const unnamed = await setUp(t)
  const { loan } = await unnamed.take()
  t.strictSame(await rowsOf(loan.connection, 'show application_name'), [{ application_name: 'fastify-request-db' }])
  loan.checkIn()
  const named = await setUp(t, { connectionString: `${database.connectionString}?application_name=mine` })
  const mine = await named.take()
  t.strictSame(await rowsOf(mine.loan.connection, 'show application_name'), [{ application_name: 'mine' }])
  mine.loan.checkIn()
})

t.test('close() ends idle connections with a goodbye, and can be called again', async (t) => {
  const { proxy, pool, take, visit } = await setUp(t, { pool: { size: 2 } })
  const [one, other] = [await take(), await take()]
  one.loan.checkIn()
  other.loan.checkIn()
  await Promise.all([pool.close(), pool.close()])
  await pool.close()
  t.ok(proxy.sessions.every(({ terminated }) => terminated))
  t.match(pool.snapshot(), { open: 0, idle: 0, totals: { closed: 2 } })
  t.strictSame(visit().visitor.told, ['POOL_CLOSED'])
  t.strictSame(await database.backends(), [])
})

t.test('close() refuses who waits at once, waits for who holds, and then evicts them', async (t) => {
  const { pool, take, visit } = await setUp(t, { closeGraceMillis: 200, settleTimeoutMillis: 100 })
  const { visitor } = await take()
  const waiting = visit()
  const since = performance.now()
  const closed = pool.close()
  t.strictSame(waiting.visitor.told, ['POOL_CLOSED'])
  t.strictSame(visitor.told, ['granted'])
  await closed
  const after = performance.now() - since
  t.ok(after >= 195 && after < 2000, `after ${after} ms`)
  t.match(visitor.told, ['granted', ['evicted', 'POOL_CLOSED']])
  t.match(pool.snapshot(), { open: 0 })
  await eventually(async () => (await database.backends()).length === 0)
})

t.test('close() goes on as soon as the last holder has left', async (t) => {
  const { pool, take } = await setUp(t, { closeGraceMillis: 30_000 })
  const { loan } = await take()
  const closed = pool.close()
  loan.checkIn()
  await closed
  t.match(pool.snapshot(), { open: 0, checkedOut: 0, totals: { closed: 1 } })
})

t.test('the time that holders have runs from startClosing(), and close() adds none', async (t) => {
  const { pool, take } = await setUp(t, { closeGraceMillis: 300, settleTimeoutMillis: 50 })
  const { visitor } = await take()
  const since = performance.now()
  pool.startClosing()
  pool.startClosing()
  await eventually(() => visitor.told.length === 2)
  const after = performance.now() - since
  t.match(visitor.told, ['granted', ['evicted', 'POOL_CLOSED']])
  t.ok(after >= 295 && after < 1500, `after ${after} ms`)
  visitor.loan!.checkIn()
  await pool.close()
  t.ok(performance.now() - since < 2000)
})

t.test('while it closes, who has something to commit is served', async (t) => {
  const { pool, take, visit } = await setUp(t, { closeGraceMillis: 30_000 })
  const { loan } = await take()
  const committing = visit()
  committing.visitor.isEnding = true
  const other = visit()
  pool.startClosing()
  t.strictSame(other.visitor.told, ['POOL_CLOSED'])
  const closed = pool.close()
  loan.checkIn()
  t.strictSame(committing.visitor.told, ['granted'])
  committing.visitor.loan!.checkIn()
  await closed
  t.match(pool.snapshot(), { open: 0 })
})

t.test('startClosing() still gives out what is free', async (t) => {
  const { pool, take, visit } = await setUp(t, { pool: { size: 2 } })
  const { loan } = await take()
  pool.startClosing()
  const { visitor } = visit()
  await eventually(() => visitor.loan !== undefined)
  t.strictSame(visit().visitor.told, ['POOL_CLOSED'])
  visitor.loan!.checkIn()
  loan.checkIn()
})

t.test('a snapshot is plain data, and does not change', async (t) => {
  const { pool, take } = await setUp(t)
  const before = pool.snapshot()
  const { loan } = await take()
  t.equal(before.totals.opened, 0)
  t.strictSame(JSON.parse(JSON.stringify(before)), before)
  loan.checkIn()
})
