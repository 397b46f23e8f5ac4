import { sql } from 'kysely'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, verbs } from '../support/notebook.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import { buildRelay, handedOver, RELAY, type Relay, STYLES } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// Who follows whom: in the order of asking, one at a time, and only who can tell its own answers from those before.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

/** Holds A's COMMIT back: nobody before it, and nobody behind it yet. */
async function withCommitUnanswered({ proxy, hold }: Relay) {
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await hold('A')
  first.letGo()
  await answered.sprung
  return { first, release: () => answered.release() }
}

/** The ways to a connection of a session without BEGIN. */
const UNABLE: { name: string; ask: (relay: Relay) => Promise<unknown> }[] = [
  { name: 'ping()', ask: ({ app }) => app.db.ping() },
  { name: 'kysely', ask: ({ app }) => app.db.kysely.insertInto('notes').values({ note: 'X' }).execute() },
  {
    name: 'an autocommit session',
    ask: ({ app }) => app.db.session({ autocommit: true }, (db) => add(db, 'X')),
  },
]

for (const { name, ask } of UNABLE) {
  test(`${name} waits for COMMIT to be answered, and nobody overtakes it`, async (t) => {
    const relay = await buildRelay(t, database)
    const { app, proxy } = relay
    const { first, release } = await withCommitUnanswered(relay)
    const order: string[] = []
    const unable = ask(relay).then(() => order.push('unable'))
    await eventually(() => app.db.snapshot().waiting === 1)
    const next = relay.post('/one/B').then(() => order.push('B'))
    await eventually(() => app.db.snapshot().waiting === 2)
    t.match(app.db.snapshot().totals, { handOvers: 0 })
    t.strictSame(verbs(proxy), [['BEGIN', 'INSERT'], ['COMMIT']])
    release()
    await Promise.all([first.answer, unable, next])
    t.strictSame(order, ['unable', 'B'])
    t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0 })
    await holds(t, database, name === 'ping()' ? ['A', 'B'] : ['A', 'X', 'B'])
  })

  test(`${name} at the head of the queue holds up the hand-over`, async (t) => {
    const relay = await buildRelay(t, database)
    const { app, proxy } = relay
    const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const first = await relay.hold('A')
    const unable = ask(relay)
    await eventually(() => app.db.snapshot().waiting === 1)
    const next = await relay.enqueue('/one/B')
    first.letGo()
    await answered.sprung
    t.match(app.db.snapshot(), { waiting: 2, totals: { handOvers: 0 } })
    t.equal(proxy.flights.length, 2)
    answered.release()
    await unable
    t.equal((await next.answer).statusCode, 200)
    await first.answer
    await holds(t, database, name === 'ping()' ? ['A', 'B'] : ['A', 'X', 'B'])
  })
}

test('a ping in a crowd is served in its turn', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 20_000 } })
  const { app } = relay
  let over = false
  const crowd = Array.from({ length: 4 }, async () => {
    while (!over) await relay.post('/one/crowd')
  })
  await eventually(() => app.db.snapshot().totals.handOvers > 20)
  for (let ping = 0; ping < 5; ping++) {
    const { checkouts } = app.db.snapshot().totals
    await app.db.ping()
    const passed = app.db.snapshot().totals.checkouts - checkouts
    t.ok(passed <= 5, `${passed} checkouts, its own included`)
  }
  over = true
  await Promise.all(crowd)
})

for (const size of [1, 2]) {
  test(`forty sessions of all kinds leave in the order of asking (size ${size})`, async (t) => {
    const relay = await buildRelay(t, database, { pool: { size } }, (app) => {
      app.post<{ Params: { way: string; note: string } }>('/ways/:way/:note', async ({ db, params: { way, note } }) => {
        const insert = sql.raw(`insert into notes (note) values ('n${note}')`)
        const asked = insert.execute(db)
        if (way === 'nested') await asked.then(() => db.transaction().execute((trx) => sql`select 1`.execute(trx)))
        else if (way === 'parallel') await Promise.all([asked, sql`select 1`.execute(db)])
        else if (way === 'added') await asked.then(() => db.add(db.insertInto('notes').values({ note: 'more' })))
        else if (way === 'failing') {
          await asked
          db.add(db.insertInto('notes').values({ note: null as unknown as string }))
        } else if (way === 'throws') {
          await asked
          throw new Error('mine')
        } else await asked
      })
    })
    const { app, proxy } = relay
    const ways = ['one', 'nested', 'failing', 'parallel', 'throws', 'added']
    const holders = await Promise.all(Array.from({ length: size }, (_, at) => relay.hold(`A${at}`)))
    const queued = []
    for (let at = 0; at < 40; at++) {
      queued.push((await relay.enqueue(`/ways/${ways[at % ways.length]}/${String(at).padStart(2, '0')}`)).answer)
    }
    for (const holder of holders) holder.letGo()
    const answers = await Promise.all(queued)
    const fails = new Set(['failing', 'throws'])
    for (const [at, { statusCode }] of answers.entries()) {
      t.equal(statusCode, fails.has(ways[at % ways.length]!) ? 500 : 200)
    }
    const asked = proxy.statements().flatMap((flight) => flight.flatMap((text) => /'n(\d\d)'/.exec(text)?.[1] ?? []))
    t.strictSame(
      [...new Set(asked)],
      Array.from({ length: 40 }, (_, at) => String(at).padStart(2, '0')),
    )
    t.match(app.db.snapshot().totals, { opened: size, invalidated: 0, replays: 0 })
    t.ok(app.db.snapshot().totals.handOvers > 30)
  })
}

test('one at a time waits behind a COMMIT, whatever it is', async (t) => {
  for (const { name, leaves } of STYLES) {
    const relay = await buildRelay(t, database)
    const { app, proxy } = relay
    const { first, release } = await withCommitUnanswered(relay)
    const second = relay.post(`/${name}/B`)
    await handedOver(relay)
    const third = await relay.enqueue('/one/C')
    const fourth = await relay.enqueue('/added/D')
    t.strictSame(verbs(proxy), [['BEGIN', 'INSERT'], ['COMMIT'], leaves], name)
    t.match(app.db.snapshot(), { checkedOut: 1, waiting: 2, totals: { handOvers: 1 } })
    release()
    for (const { statusCode } of await Promise.all([first.answer, second, third.answer, fourth.answer])) {
      t.equal(statusCode, 200)
    }
    await nothingIsLeft(t)
    t.match(app.db.snapshot().totals, { handOvers: 3, opened: 1, checkouts: 4, commits: 4 })
  }
})

inBothModes(
  database,
  'commit() by hand sends its session to the end of the queue, and does not lock it out',
  async (t, commitOn) => {
    const begun = gate()
    const goOn = gate()
    const relay = await buildRelay(t, database, { commitOn }, (app) => {
      app.post('/steps', async ({ db }) => {
        await add(db, 'A1')
        begun.open()
        await goOn.opened
        await db.commit()
        await add(db, 'A2')
        await db.rollback()
        await add(db, 'A3')
        await db.commit()
        await add(db, 'A4')
        return 'kept'
      })
    })
    const { app, proxy } = relay
    const first = relay.post('/steps')
    await begun.opened
    const others = []
    for (const [note, way] of Object.entries({ B: 'one', C: 'nested', D: 'parallel' })) {
      others.push((await relay.enqueue(`/${way}/${note}`)).answer)
    }
    goOn.open()
    for (const { statusCode } of await Promise.all([first, ...others])) t.equal(statusCode, 200)
    await holds(t, database, ['A1', 'B', 'C', 'D', 'D', 'D', 'A3', 'A4'])
    const firsts = verbs(proxy).filter(([verb]) => verb === 'BEGIN')
    t.match(firsts[1], ['BEGIN', 'INSERT'])
    t.match(firsts[2], ['BEGIN', 'SAVEPOINT'])
    t.match(app.db.snapshot().totals, { opened: 1, commits: 6, rollbacks: 1, timeouts: 0, invalidated: 0 })
  },
)

test('a new connection is opened rather than followed on an old one', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 2 } })
  const { app } = relay
  const { first, release } = await withCommitUnanswered(relay)
  t.equal((await relay.post('/one/B')).statusCode, 200)
  t.match(app.db.snapshot(), { open: 2, totals: { handOvers: 0 } })
  release()
  t.equal((await first.answer).statusCode, 200)
})

test('where nobody may wait, nobody follows', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 0 } })
  const { app } = relay
  const { first, release } = await withCommitUnanswered(relay)
  t.match((await relay.post('/one/B')).json(), { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
  release()
  t.equal((await first.answer).statusCode, 200)
  t.match(app.db.snapshot(), { idle: 1, totals: { handOvers: 0, timeouts: 1 } })
})

test('a connection that is due for replacement is not handed over', async (t) => {
  const clock = takeClock(t)
  const relay = await buildRelay(t, database, { pool: { recycleMillis: 60_000, timeoutMillis: 1_000_000 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  clock.advance(70_000)
  first.letGo()
  await answered.sprung
  const third = await relay.enqueue('/one/C')
  t.match(app.db.snapshot(), { checkedOut: 1, waiting: 2, totals: { handOvers: 0 } })
  answered.release()
  for (const { answer } of [first, second, third]) t.equal((await answer).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, totals: { recycled: 1, opened: 2, handOvers: 1, invalidated: 0 } })
  t.equal(proxy.sessions.length, 2)
  t.equal(proxy.sessions[0]?.terminated, true, 'it was ended in good order')
  await holds(t, database, ['A', 'B', 'C'])
})

test('the second of two connections is followed where the first is due for replacement', async (t) => {
  const clock = takeClock(t)
  const relay = await buildRelay(t, database, { pool: { size: 2, recycleMillis: 60_000, timeoutMillis: 1_000_000 } })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold', { times: 2 })
  const old = await relay.hold('A')
  clock.advance(50_000)
  const young = await relay.hold('Y')
  clock.advance(20_000)
  old.letGo()
  await answered.sprung
  young.letGo()
  await eventually(() => verbs(proxy).filter(([verb]) => verb === 'COMMIT').length === 2)
  const next = relay.post('/one/B')
  await eventually(() => app.db.snapshot().totals.handOvers === 1)
  t.equal(app.db.snapshot().waiting, 0)
  answered.release()
  for (const answer of [old.answer, young.answer, next]) t.equal((await answer).statusCode, 200)
  t.match(app.db.snapshot().totals, { recycled: 1, handOvers: 1 })
})

test('a connection beyond the size is handed over, and closed when nobody waits', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 1, maxOverflow: 1 } })
  const { app, proxy } = relay
  const [one, two] = [await relay.hold('A'), await relay.hold('B')]
  const others = [await relay.enqueue('/one/C'), await relay.enqueue('/one/D'), await relay.enqueue('/one/E')]
  t.match(app.db.snapshot(), { open: 2, overflow: 1, waiting: 3 })
  one.letGo()
  two.letGo()
  for (const { answer } of [one, two, ...others]) t.equal((await answer).statusCode, 200)
  await eventually(() => app.db.snapshot().open === 1)
  t.match(app.db.snapshot(), { idle: 1, overflow: 0, totals: { opened: 2, closed: 1, handOvers: 3, invalidated: 0 } })
  t.equal(proxy.sessions.length, 2)
})

test('a connection that is handed over is not pinged', async (t) => {
  const clock = takeClock(t)
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 1_000_000, prePing: { idleMillis: 0 } } })
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  clock.advance(10_000)
  first.letGo()
  t.equal((await second.answer).statusCode, 200)
  t.equal((await first.answer).statusCode, 200)
  t.notOk(verbs(relay.proxy).some((flight) => flight.length === 0))
})

test('a read-only session answers before its COMMIT does, and is followed all the same', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  t.equal((await relay.post('/read/A')).statusCode, 200)
  await answered.sprung
  const second = relay.post('/parallel/B')
  await handedOver(relay)
  t.strictSame(verbs(proxy), [['BEGIN', 'SELECT'], ['COMMIT'], ['BEGIN', 'INSERT', 'INSERT', 'INSERT']])
  answered.release()
  t.equal((await second).statusCode, 200)
  t.match(app.db.snapshot().totals, { handOvers: 1, commits: 2 })
})

inBothModes(
  database,
  'nothing of one session’s settings, role or failure reaches the one behind',
  async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn }, (app) => {
      app.get('/whoami', async ({ db }) => {
        const { rows } = await sql`select current_setting('app.tenant', true) as tenant, current_user as user_name,
        current_setting('statement_timeout') as timeout, current_setting('transaction_read_only') as read_only`.execute(
          db,
        )
        return rows[0]
      })
      const limited = { config: { db: { statementTimeoutMillis: 777, readOnly: true } } }
      app.get('/limited', limited, async ({ db }) => sql`set local role pg_monitor`.execute(db).then(() => 'ok'))
      app.get('/faulty', async ({ db }) => sql`select 1/0`.execute(db))
    })
    const { app } = relay
    const nobody = (await app.inject('/whoami')).json()
    t.match(nobody, { tenant: null, timeout: '0', read_only: 'off' })
    const first = await relay.hold('failing A')
    const answers = []
    for (const before of ['/settled/B', '/limited', '/faulty', '/failing/C']) {
      const method = before.split('/').length > 2 ? 'POST' : 'GET'
      void app.inject({ method, url: before })
      await eventually(() => app.db.snapshot().waiting === answers.length * 2 + 1)
      answers.push(app.inject('/whoami'))
      await eventually(() => app.db.snapshot().waiting === answers.length * 2)
    }
    first.letGo()
    // A parameter that was set once is empty afterwards, not unknown.
    for (const answer of await Promise.all(answers)) t.strictSame({ ...answer.json(), tenant: null }, nobody)
    for (const answer of await Promise.all(answers)) t.notOk(answer.json().tenant)
    t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0 })
  },
)
