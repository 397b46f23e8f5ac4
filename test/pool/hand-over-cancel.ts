import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, verbs } from '../support/notebook.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import { buildRelay, freeze, handedOver, notesOf, RELAY, STYLES } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// Who leaves behind an unanswered COMMIT must not take that COMMIT along, and whose COMMIT is sent may leave.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

const HELD = [['BEGIN', 'INSERT'], ['COMMIT']]

for (const style of STYLES) {
  const { name } = style

  inBothModes(database, `the client of '${name}' leaves while it is behind`, async (t, commitOn) => {
    const { leaves, isWhole = false } = style
    // Under onResponse these have their answer before they have a connection.
    if (commitOn === 'onResponse' && (isWhole || name === 'unawaited')) return
    const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 })
    const { app, proxy } = relay
    const ice = await freeze(t, database)
    const first = await relay.hold('slow A')
    const client = (await openHttp(t, app)).send('POST', `/${name}/B`)
    await eventually(() => app.db.snapshot().waiting === 1)
    const third = await relay.enqueue('/one/C')
    first.letGo()
    await ice.frozen()
    await handedOver(relay)
    client.reset()
    await eventually(() => relay.gone() === 1)
    // What runs gets 50 ms before it is cancelled: here it has had more.
    const since = performance.now()
    await eventually(() => performance.now() - since > 120)
    t.strictSame(proxy.cancels, [], 'a cancel would hit the COMMIT before')
    t.match(app.db.snapshot(), { checkedOut: 1, waiting: 1 })
    await ice.thaw()
    const answer = await first.answer
    t.equal(answer.statusCode, 200)
    t.equal(answer.body, 'kept')
    t.equal((await third.answer).statusCode, 200)
    await holds(t, database, ['slow A', ...(isWhole ? notesOf(style, 'B') : []), 'C'])
    const end = isWhole ? [] : [['ROLLBACK']]
    t.strictSame(verbs(proxy), [...HELD, leaves, ...end, ['BEGIN', 'INSERT'], ['COMMIT']])
    // Whether it is quiet in time to be handed over uncancelled is a matter of the machine's speed.
    const totals = { opened: 1, invalidated: 0, timeouts: 0, replays: 0 }
    t.match(app.db.snapshot(), { idle: 1, totals })
  })
}

inBothModes(
  database,
  'who leaves with a long statement is cancelled, but not before BEGIN is answered',
  async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 }, (app) => {
      app.post('/sleeps/:note', ({ db }) => Promise.all([add(db, 'lost'), sql`select pg_sleep(60)`.execute(db)]))
    })
    const { app, proxy } = relay
    const ice = await freeze(t, database)
    const first = await relay.hold('slow A')
    const client = (await openHttp(t, app)).send('POST', '/sleeps/B')
    await eventually(() => app.db.snapshot().waiting === 1)
    const third = await relay.enqueue('/nested/C')
    first.letGo()
    const pid = await ice.frozen()
    await handedOver(relay)
    client.destroy()
    await eventually(() => relay.gone() === 1)
    t.strictSame(proxy.cancels, [])
    const since = performance.now()
    await ice.thaw()
    t.equal((await first.answer).statusCode, 200)
    t.equal((await third.answer).statusCode, 200)
    t.ok(performance.now() - since < 3000)
    t.strictSame(proxy.cancels, [pid])
    await holds(t, database, ['slow A', 'C'])
    t.match(app.db.snapshot(), { idle: 1, totals: { cancels: 1, opened: 1, invalidated: 0, handOvers: 1 } })
    t.strictSame(proxy.flights[3]?.statements, ['ROLLBACK'], 'answered before the next one begins')
  },
)

inBothModes(database, 'the client leaves after its COMMIT was sent: that stands', async (t, commitOn) => {
  const goOn = gate()
  const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 }, (app) => {
    app.post('/leaves/:note', async ({ db }) => {
      await add(db, 'slow A')
      await goOn.opened
      return 'kept'
    })
  })
  const { app, proxy } = relay
  const ice = await freeze(t, database)
  const client = (await openHttp(t, app)).send('POST', '/leaves/A')
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  const second = await relay.enqueue('/parallel/B')
  goOn.open()
  await ice.frozen()
  await handedOver(relay)
  client.reset()
  await eventually(() => client.closed)
  if (commitOn === 'onSend') await eventually(() => relay.gone() === 1)
  await ice.thaw()
  t.equal((await second.answer).statusCode, 200)
  await holds(t, database, ['slow A', 'B', 'B', 'B'])
  t.strictSame(proxy.cancels, [])
  t.match(app.db.snapshot().totals, { commits: 2, rollbacks: 0, opened: 1, invalidated: 0, handOvers: 1 })
})

inBothModes(
  database,
  'the client leaves during a commit() by hand: that stands, and the rest is refused',
  async (t, commitOn) => {
    const goOn = gate()
    const ended = gate<unknown>()
    const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 }, (app) => {
      app.post('/leaves/:note', async ({ db }) => {
        await add(db, 'slow A')
        await goOn.opened
        await db.commit()
        const refused = await add(db, 'lost').catch((error: { code: string }) => error.code)
        ended.open(refused)
        return 'kept'
      })
    })
    const { app, proxy } = relay
    const ice = await freeze(t, database)
    const client = (await openHttp(t, app)).send('POST', '/leaves/A')
    await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
    const second = await relay.enqueue('/nested/B')
    goOn.open()
    await ice.frozen()
    await handedOver(relay)
    client.reset()
    await eventually(() => relay.gone() === 1)
    await ice.thaw()
    t.equal((await second.answer).statusCode, 200)
    t.equal(await ended.opened, 'FST_REQUEST_DB_SESSION_ENDED')
    await holds(t, database, ['slow A', 'B'])
    t.strictSame(proxy.cancels, [])
    t.match(app.db.snapshot().totals, { commits: 2, rollbacks: 0, opened: 1, invalidated: 0, checkouts: 2 })
  },
)

inBothModes(database, 'both leave', async (t, commitOn) => {
  const goOn = gate()
  const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 }, (app) => {
    app.post('/leaves/:note', async ({ db }) => {
      await add(db, 'slow A')
      await goOn.opened
      return 'kept'
    })
  })
  const { app, proxy } = relay
  const ice = await freeze(t, database)
  const one = (await openHttp(t, app)).send('POST', '/leaves/A')
  await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
  const two = (await openHttp(t, app)).send('POST', '/raw/B')
  await eventually(() => app.db.snapshot().waiting === 1)
  goOn.open()
  await ice.frozen()
  await handedOver(relay)
  two.reset()
  one.reset()
  await eventually(() => relay.gone() === (commitOn === 'onSend' ? 2 : 1))
  await ice.thaw()
  await holds(t, database, ['slow A'])
  t.strictSame(verbs(proxy), [...HELD, ['BEGIN'], ['ROLLBACK']])
  t.match(app.db.snapshot(), { idle: 1, totals: { commits: 1, rollbacks: 1, cancels: 0, opened: 1, invalidated: 0 } })
})

inBothModes(database, 'a handler that times out while it is behind', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 8000 }, (app) => {
    app.get('/timed', { handlerTimeout: 100 }, async ({ db }) => {
      await add(db, 'lost')
      return 'kept?'
    })
  })
  const { app, proxy } = relay
  const ice = await freeze(t, database)
  const first = await relay.hold('slow A')
  const second = app.inject('/timed')
  await eventually(() => app.db.snapshot().waiting === 1)
  first.letGo()
  await ice.frozen()
  await handedOver(relay)
  t.match((await second).json(), { statusCode: 503, code: 'FST_ERR_HANDLER_TIMEOUT' })
  await ice.thaw()
  t.equal((await first.answer).statusCode, 200)
  await holds(t, database, ['slow A'])
  t.strictSame(verbs(proxy), [...HELD, ['BEGIN', 'INSERT'], ['ROLLBACK']])
  t.match(app.db.snapshot(), { idle: 1, totals: { cancels: 0, opened: 1, invalidated: 0 } })
})

inBothModes(database, 'who has only thrown hands its ROLLBACK over like a COMMIT', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'ROLLBACK' }, 'hold')
  const first = await relay.hold('throws A')
  const second = await relay.enqueue('/raw/B')
  const third = await relay.enqueue('/one/C')
  first.letGo()
  await answered.sprung
  await handedOver(relay)
  t.match(app.db.snapshot(), { waiting: 1, totals: { handOvers: 1 } })
  answered.release()
  t.match((await first.answer).json(), { message: 'mine' })
  t.equal((await second.answer).statusCode, 200)
  t.equal((await third.answer).statusCode, 200)
  await holds(t, database, ['B', 'C'])
  t.match(app.db.snapshot().totals, { handOvers: 2, rollbacks: 1, commits: 2, opened: 1, cancels: 0 })
})

for (const size of [1, 2]) {
  for (const end of ['COMMIT', 'ROLLBACK'] as const) {
    test(`a session fails in the very moment in which it is handed a connection (${end}, size ${size})`, async (t) => {
      let go = gate()
      let inHand = gate()
      const relay = await buildRelay(t, database, { settleTimeoutMillis: 1000, pool: { size } }, (app) => {
        app.post<{ Params: { turns: string } }>('/first/:turns', async ({ db, params }) => {
          await add(db, 'A')
          inHand.open()
          await go.opened
          for (let turn = 0; turn < Number(params.turns); turn++) await null
          if (end === 'ROLLBACK') throw new Error('mine')
          return 'kept'
        })
        app.post<{ Params: { turns: string } }>('/second/:turns', async ({ db, params }) => {
          const fails = async () => {
            await go.opened
            for (let turn = 0; turn < Number(params.turns); turn++) await null
            throw new Error('mine')
          }
          await Promise.all([add(db, 'B'), fails()])
        })
      })
      const { app } = relay
      const other = size === 2 ? await relay.hold('D') : undefined
      // One upstream call ends for both: whether the one is granted or leaves the queue first is a matter of microtasks.
      const least = 15
      for (let offset = -least; offset <= least; offset++) {
        go = gate()
        inHand = gate()
        const first = relay.post(`/first/${Math.max(0, -offset)}`)
        await inHand.opened
        const second = await relay.enqueue(`/second/${Math.max(0, offset)}`)
        const since = performance.now()
        go.open()
        t.equal((await first).statusCode, end === 'COMMIT' ? 200 : 500)
        t.match((await second.answer).json(), { message: 'mine' })
        t.ok(performance.now() - since < 900, `offset ${offset}`)
        const { checkedOut } = app.db.snapshot()
        if (checkedOut > size - 1) await eventually(() => app.db.snapshot().checkedOut === size - 1)
      }
      other?.letGo()
      await other?.answer
      await nothingIsLeft(t)
      const rows = end === 'COMMIT' ? 2 * least + 1 : 0
      t.equal((await database.rows('notes')).length, rows + (size - 1))
      t.match(app.db.snapshot(), { open: size, idle: size, totals: { opened: size, invalidated: 0, cancels: 0 } })
      t.ok(app.db.snapshot().totals.handOvers > 0, 'both orders were tried')
    })
  }
}
