import { setTimeout as moment } from 'node:timers/promises'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn, pidOf, terminate, verbs } from '../support/notebook.ts'
import { buildRelay, freeze, handedOver, RELAY } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// The deadlines of sessions that follow each other, and the connections they are not given.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

const UNKNOWN = { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' }
const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }
const TIMEOUT = { code: 'FST_REQUEST_DB_POOL_TIMEOUT' }

// settleTimeoutMillis

test('a COMMIT that gets no answer takes the one behind along; who waits for both is served elsewhere', async (t) => {
  const relay = await buildRelay(t, database, { settleTimeoutMillis: 250 })
  const { app, proxy } = relay
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  const third = await relay.enqueue('/one/C')
  const fourth = await relay.enqueue('/added/D')
  const since = performance.now()
  first.letGo()
  t.match((await first.answer).json(), UNKNOWN)
  t.match((await second.answer).json(), LOST, 'never sent again on a timeout')
  t.ok(performance.now() - since < 1000, 'nobody waits for longer than settleTimeoutMillis')
  t.equal((await third.answer).statusCode, 200)
  t.equal((await fourth.answer).statusCode, 200)
  await holds(t, database, ['C', 'D', 'D'])
  t.match(app.db.snapshot(), {
    open: 1,
    totals: { opened: 2, invalidated: 1, replays: 0, failedCommits: 1, commits: 2 },
  })
})

inBothModes(database, 'a ROLLBACK that gets no answer is not the error of its request', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 250 })
  const { app, proxy } = relay
  proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'swallow')
  const first = await relay.hold('throws A')
  const second = await relay.enqueue('/one/B')
  const third = await relay.enqueue('/one/C')
  first.letGo()
  t.match((await first.answer).json(), { statusCode: 500, message: 'mine' })
  t.match((await second.answer).json(), LOST)
  t.equal((await third.answer).statusCode, 200)
  await holds(t, database, ['C'])
  t.match(app.db.snapshot().totals, { handOvers: 1, replays: 0, opened: 2, invalidated: 1 })
})

test('settleTimeoutMillis is COMMIT’s own: the time behind another’s is not taken off it', async (t) => {
  const relay = await buildRelay(t, database, { settleTimeoutMillis: 1000 })
  const { app, proxy } = relay
  const ice = await freeze(t, database)
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/added/slow B')
  first.letGo()
  await held.sprung
  await moment(700)
  held.release()
  t.equal((await first.answer).statusCode, 200)
  await ice.frozen()
  await moment(700)
  await ice.thaw()
  t.equal((await second.answer).statusCode, 200, 'it took 700 ms of its 1000')
  await holds(t, database, ['A', 'slow B', 'slow B'])
  t.match(app.db.snapshot().totals, { invalidated: 0, opened: 1 })
})

// maxSessionMillis

for (const isObstructed of [false, true]) {
  const how = isObstructed ? ', even where it was sent twice' : ''
  test(`maxSessionMillis counts from the answer to BEGIN for who waited behind a COMMIT${how}`, async (t) => {
    const begun = gate()
    const relay = await buildRelay(t, database, { maxSessionMillis: 300 }, (app) => {
      app.post('/long', async ({ db }) => {
        await add(db, 'too long')
        begun.open()
        await gate().opened
      })
    })
    const text = isObstructed ? '23502' : 'COMMIT'
    const held = relay.proxy.trap({ from: 'server', type: isObstructed ? 'E' : 'C', text }, 'hold')
    const first = await relay.hold(isObstructed ? 'failing A' : 'A')
    first.letGo()
    await held.sprung
    const long = relay.post('/long')
    await handedOver(relay)
    await moment(400)
    t.equal(relay.app.db.snapshot().checkedOut, 1, 'waiting is not holding')
    held.release()
    await begun.opened
    const since = performance.now()
    await eventually(() => relay.app.db.snapshot().checkedOut === 0)
    t.ok(performance.now() - since > 200, `after ${performance.now() - since} ms`)
    await holds(t, database, isObstructed ? [] : ['A'])
    t.equal((await first.answer).statusCode, isObstructed ? 500 : 200)
    void long.catch(() => {})
  })
}

// pool.timeoutMillis

for (const how of ['throws', 'returns', 'falls back'] as const) {
  test(`a session outside of a request that is overdue behind a COMMIT ends at once (${how})`, async (t) => {
    const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 }, settleTimeoutMillis: 5000 })
    const { app, proxy } = relay
    const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const first = await relay.hold('A')
    first.letGo()
    await held.sprung
    const since = performance.now()
    const late = setTimeout(() => held.release(), 2000)
    const session = app.db.session(async (db) => {
      const added = add(db, 'B')
      // Nobody awaits it, so that the session cannot know of it when it returns.
      if (how === 'returns') added.catch(() => {})
      else if (how === 'throws') await added
      else return added.then(() => 'kept').catch(() => 'something else')
      return 'kept?'
    })
    // Who has heard of it may answer something else, as if it had been refused in the queue: nothing has been done.
    if (how === 'falls back') t.equal(await session, 'something else')
    else await t.rejects(session, TIMEOUT)
    t.ok(performance.now() - since < 1000, `after ${performance.now() - since} ms`)
    clearTimeout(late)
    held.release()
    t.equal((await first.answer).statusCode, 200)
    await holds(t, database, ['A'])
    t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { timeouts: 1, opened: 1, invalidated: 0 } })
  })
}

// A goodbye in the same packet as the answer by which the connection changed hands

const locksWaitedFor = async () => {
  const waits = await database.query("select from pg_locks where not granted and relation = 'notes'::regclass")
  return waits.length
}

inBothModes(
  database,
  'who is handed a connection by the very packet that ends it goes elsewhere',
  async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn })
    const { app, proxy } = relay
    const first = await relay.hold('A')
    const second = await relay.enqueue('/added/B')
    const third = await relay.enqueue('/one/C')
    const fourth = await relay.enqueue('/added/D')
    const lock = await database.client()
    const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    // It waits for A's COMMIT, and then keeps B's INSERT waiting.
    const locked = lock.query('begin; lock table notes in exclusive mode')
    await eventually(async () => (await locksWaitedFor()) === 1)
    first.letGo()
    const { pid } = await held.sprung
    await locked
    await handedOver(relay)
    // COMMIT's answer, that to BEGIN of B, which C is to follow, and the goodbye instead of B's INSERT.
    await eventually(async () => (await database.backends()).some(({ waitEvent }) => waitEvent === 'relation'))
    await terminate(database, pid as number)
    await lock.query('rollback')
    held.release()
    t.equal((await first.answer).statusCode, 200)
    if (commitOn === 'onSend') t.match((await second.answer).json(), LOST)
    t.equal((await third.answer).statusCode, 200)
    t.equal((await fourth.answer).statusCode, 200)
    await holds(t, database, ['A', 'C', 'D', 'D'])
    t.match(app.db.snapshot(), { open: 1, totals: { opened: 2, invalidated: 1 } })
  },
)

inBothModes(database, 'a connection that ends in the very packet that opened it is replaced', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn })
  const { app, proxy } = relay
  const held = proxy.trap({ from: 'server', type: 'Z' }, 'hold')
  const first = relay.post('/one/A')
  const { pid } = await held.sprung
  const second = await relay.enqueue('/added/B')
  await terminate(database, pid as number)
  held.release()
  t.equal((await first).statusCode, 200)
  t.equal((await second.answer).statusCode, 200)
  await holds(t, database, ['A', 'B', 'B'])
  t.match(app.db.snapshot(), { open: 1, totals: { opened: 2, invalidated: 1 } })
})

// Connections

test('a connection that is due for replacement is not handed over, but replaced', async (t) => {
  const relay = await buildRelay(t, database, { pool: { recycleMillis: 100 } })
  const { app, proxy } = relay
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  await moment(120)
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  first.letGo()
  await held.sprung
  const third = await relay.enqueue('/added/C')
  t.match(app.db.snapshot(), { waiting: 2, totals: { handOvers: 0 } })
  held.release()
  for (const { answer } of [first, second, third]) t.equal((await answer).statusCode, 200)
  t.not(proxy.sessions.length, 1)
  t.match(app.db.snapshot().totals, { recycled: 1, invalidated: 0 })
  await holds(t, database, ['A', 'B', 'C', 'C'])
})

test('one that falls due while somebody is behind is replaced after them', async (t) => {
  const relay = await buildRelay(t, database, { pool: { recycleMillis: 400 } })
  const { app, proxy } = relay
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  const third = await relay.enqueue('/one/C')
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  first.letGo()
  await handedOver(relay)
  await moment(450)
  held.release()
  for (const { answer } of [first, second, third]) t.equal((await answer).statusCode, 200)
  t.strictSame(
    proxy.flights.map(({ connection }) => connection),
    [1, 1, 1, 1, 2, 2],
  )
  t.match(app.db.snapshot().totals, { handOvers: 1, recycled: 1, opened: 2 })
  await holds(t, database, ['A', 'B', 'C'])
})

test('overflow connections are handed over, and closed when nobody waits', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 1, maxOverflow: 2 } })
  const { app, proxy } = relay
  const holders = await Promise.all(['A', 'B', 'C'].map((note) => relay.hold(note)))
  const followers = []
  for (const note of ['D', 'E', 'F', 'G', 'H', 'I']) followers.push(await relay.enqueue(`/one/${note}`))
  t.match(app.db.snapshot(), { checkedOut: 3, waiting: 6, overflow: 2 })
  for (const { letGo } of holders) letGo()
  for (const { answer } of [...holders, ...followers]) t.equal((await answer).statusCode, 200)
  await eventually(() => app.db.snapshot().open === 1)
  t.match(app.db.snapshot(), { idle: 1, overflow: 0, totals: { opened: 3, closed: 2, handOvers: 6 } })
  t.equal(proxy.sessions.length, 3)
  t.strictSame((await notesIn(database)).sort(), [...'ABCDEFGHI'])
})

test('no connection is asked whether it is alive before it is handed over', async (t) => {
  const relay = await buildRelay(t, database, { pool: { prePing: { idleMillis: 0, timeoutMillis: 500 } } })
  const first = await relay.hold('A')
  const others = [await relay.enqueue('/one/B'), await relay.enqueue('/added/C')]
  first.letGo()
  for (const { answer } of [first, ...others]) t.equal((await answer).statusCode, 200)
  t.strictSame(verbs(relay.proxy), [
    ['BEGIN', 'INSERT'],
    ['COMMIT'],
    ['BEGIN', 'INSERT'],
    ['COMMIT'],
    ['BEGIN', 'INSERT', 'INSERT', 'COMMIT'],
  ])
})

test('of the same backend, one after the other', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 2 } }, (app) => app.get('/pid', ({ db }) => pidOf(db)))
  const answers = await Promise.all(Array.from({ length: 30 }, () => relay.app.inject('/pid')))
  t.equal(new Set(answers.map(({ body }) => body)).size, 2)
  t.match(relay.app.db.snapshot(), { open: 2, totals: { opened: 2, handOvers: 28 } })
})
