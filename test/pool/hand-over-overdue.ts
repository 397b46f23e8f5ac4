import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, verbs } from '../support/notebook.ts'
import { buildRelay, freeze, handedOver, notesOf, RELAY, STYLES } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// The wait behind an unanswered COMMIT counts against pool.timeoutMillis.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

const TIMEOUT = { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' }
const HELD = [['BEGIN', 'INSERT'], ['COMMIT']]

for (const style of STYLES) {
  const { name } = style

  inBothModes(database, `'${name}' is overdue behind a COMMIT`, async (t, commitOn) => {
    const { leaves, isWhole = false } = style
    const relay = await buildRelay(t, database, { commitOn, pool: { timeoutMillis: 150 }, settleTimeoutMillis: 8000 })
    const { app, proxy, log } = relay
    const ice = await freeze(t, database)
    const first = await relay.hold('slow A')
    const since = performance.now()
    const second = await relay.enqueue(`/${name}/B`)
    first.letGo()
    await ice.frozen()
    // A way out for the test: whoever is overdue must be told long before.
    const rescue = setTimeout(() => void ice.thaw(), 2500)
    t.teardown(() => clearTimeout(rescue))
    if (isWhole) await eventually(() => performance.now() - since > 300)
    if (isWhole) await ice.thaw()
    const answer = await second.answer
    const waited = performance.now() - since
    const hasLeft = commitOn === 'onResponse' && name === 'unawaited'
    if (isWhole || hasLeft) t.equal(answer.statusCode, 200, 'a COMMIT that is on its way is waited for')
    else {
      t.match(answer.json(), TIMEOUT)
      t.ok(answer.headers['retry-after'])
      t.ok(waited >= 149 && waited < 1500, `after ${waited} ms`)
    }
    await eventually(() => app.db.snapshot().totals.timeouts === (isWhole ? 0 : 1))
    if (!isWhole) {
      await ice.frozen()
      await ice.thaw()
    }
    clearTimeout(rescue)
    t.equal((await first.answer).statusCode, 200)
    await holds(t, database, ['slow A', ...(isWhole ? notesOf(style, 'B') : [])])
    t.strictSame(verbs(proxy), [...HELD, leaves, ...(isWhole ? [] : [['ROLLBACK']])])
    t.match(app.db.snapshot(), { idle: 1, totals: { opened: 1, invalidated: 0, cancels: 0, handOvers: 1 } })
    const reported = log.problems().map(({ err }) => err?.code)
    t.strictSame(reported, hasLeft ? [TIMEOUT.code] : [])
  })
}

test('the wait in the queue and the one behind are one wait', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 400 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const since = performance.now()
  const second = await relay.enqueue('/one/B')
  await eventually(() => performance.now() - since > 250)
  first.letGo()
  await answered.sprung
  t.match((await second.answer).json(), TIMEOUT)
  const waited = performance.now() - since
  t.ok(waited >= 399 && waited < 600, `after ${waited} ms`)
  answered.release()
  t.equal((await first.answer).statusCode, 200)
  t.equal(app.db.snapshot().totals.timeouts, 1)
})

test('who waits behind the overdue one has a deadline of its own', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 300 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  first.letGo()
  await answered.sprung
  const since = performance.now()
  await eventually(() => performance.now() - since > 200)
  const third = await relay.enqueue('/one/C')
  t.match((await second.answer).json(), TIMEOUT)
  t.match(app.db.snapshot(), { waiting: 1, totals: { timeouts: 1 } })
  answered.release()
  t.equal((await third.answer).statusCode, 200, 'it is in time')
  t.equal((await first.answer).statusCode, 200)
  await holds(t, database, ['A', 'C'])
  t.match(app.db.snapshot().totals, { timeouts: 1, opened: 1, invalidated: 0 })
})

test('all who are overdue are told, behind and in the queue, and the next is served', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const others = []
  for (const way of ['raw', 'one', 'added', 'begun', 'nested']) others.push(await relay.enqueue(`/${way}/lost`))
  first.letGo()
  await answered.sprung
  for (const { answer } of others) t.match((await answer).json(), TIMEOUT)
  answered.release()
  t.equal((await first.answer).statusCode, 200)
  t.equal((await relay.post('/parallel/C')).statusCode, 200)
  await holds(t, database, ['A', 'C', 'C', 'C'])
  t.match(app.db.snapshot(), { idle: 1, totals: { timeouts: 5, opened: 1, invalidated: 0 } })
})

test('all statements of a session that is overdue are told, those too that came later', async (t) => {
  const issued = gate()
  const told: unknown[] = []
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } }, (app) => {
    app.post('/many/:note', async ({ db }) => {
      const late = issued.opened.then(() => add(db, 'lost'))
      const all = await Promise.allSettled([add(db, 'lost'), add(db, 'lost'), late])
      for (const one of all) told.push(one.status === 'rejected' ? one.reason.code : one.status)
      throw new Error('mine')
    })
  })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/many/B')
  first.letGo()
  await answered.sprung
  await handedOver(relay)
  issued.open()
  t.match((await second.answer).json(), { message: 'mine' })
  t.strictSame(told, [TIMEOUT.code, TIMEOUT.code, TIMEOUT.code])
  answered.release()
  await first.answer
  await holds(t, database, ['A'])
  t.match(app.db.snapshot().totals, { timeouts: 1, opened: 1, invalidated: 0 })
})

test('who has been answered in time is not overdue, however long its own statement takes', async (t) => {
  const inHand = gate()
  const goOn = gate()
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } }, (app) => {
    app.post('/long/:note', async ({ db }) => {
      await add(db, 'B')
      inHand.open()
      await goOn.opened
      return 'kept'
    })
  })
  const { app } = relay
  const since = performance.now()
  const first = await relay.hold('A')
  const second = await relay.enqueue('/long/B')
  first.letGo()
  await inHand.opened
  await eventually(() => performance.now() - since > 400)
  t.match(app.db.snapshot(), { checkedOut: 1, totals: { timeouts: 0, handOvers: 1 } })
  goOn.open()
  t.equal((await second.answer).statusCode, 200)
  await first.answer
  await holds(t, database, ['A', 'B'])
})

test('an app that computes past the deadline does not refuse who has been answered meanwhile', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/begun/B')
  first.letGo()
  await answered.sprung
  await handedOver(relay)
  await eventually(() => proxy.flights[2]?.status !== undefined)
  answered.release()
  for (const until = performance.now() + 300; performance.now() < until; );
  t.equal((await second.answer).statusCode, 200)
  t.equal((await first.answer).statusCode, 200)
  t.equal(app.db.snapshot().totals.timeouts, 0)
  await holds(t, database, ['A', 'B'])
})

test('who has left is not counted as overdue', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const client = (await openHttp(t, app)).send('POST', '/one/B')
  await eventually(() => app.db.snapshot().waiting === 1)
  first.letGo()
  await answered.sprung
  await handedOver(relay)
  const since = performance.now()
  client.destroy()
  await eventually(() => relay.gone() === 1 && performance.now() - since > 300)
  t.equal(app.db.snapshot().totals.timeouts, 0)
  answered.release()
  t.equal((await first.answer).statusCode, 200)
  await holds(t, database, ['A'])
  t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0, cancels: 0 })
})

test('the connection dies when who is behind has been refused: nobody is sent again', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 200 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/nested/B')
  first.letGo()
  await answered.sprung
  t.match((await second.answer).json(), TIMEOUT)
  proxy.cut('reset')
  t.match((await first.answer).json(), { code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  await holds(t, database, ['A'])
  t.match(app.db.snapshot(), { open: 0, totals: { replays: 0, timeouts: 1, invalidated: 1 } })
  t.equal((await relay.post('/nested/C')).statusCode, 200)
})
