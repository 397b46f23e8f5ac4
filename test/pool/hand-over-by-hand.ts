import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn, pidOf, verbs } from '../support/notebook.ts'
import { buildRelay, freeze, handedOver, RELAY } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// commit() and rollback() by hand hand over too, and the session goes on: on another turn, and never behind its own end.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

const UNKNOWN = { code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' }

for (const end of ['commit', 'rollback'] as const) {
  inBothModes(
    database,
    `${end}() by hand gives way to who waits, and the session goes on behind them`,
    async (t, commitOn) => {
      const written = gate()
      const goOn = gate()
      const relay = await buildRelay(t, database, { commitOn }, (app) => {
        app.post('/twice', async ({ db }) => {
          await add(db, 'A1')
          written.open()
          await goOn.opened
          await db[end]()
          await add(db, 'A2')
          return db.state
        })
      })
      const twice = relay.post('/twice')
      await written.opened
      const second = await relay.enqueue('/one/B')
      const third = await relay.enqueue('/parallel/C')
      goOn.open()
      t.equal((await twice).body, 'begun')
      for (const { answer } of [second, third]) t.equal((await answer).statusCode, 200)
      await holds(t, database, [...(end === 'commit' ? ['A1'] : []), 'B', 'C', 'C', 'C', 'A2'])
      t.strictSame(verbs(relay.proxy), [
        ['BEGIN', 'INSERT'],
        [end.toUpperCase()],
        ['BEGIN', 'INSERT'],
        ['COMMIT'],
        ['BEGIN', 'INSERT', 'INSERT', 'INSERT'],
        ['COMMIT'],
        ['BEGIN', 'INSERT'],
        ['COMMIT'],
      ])
      t.match(relay.app.db.snapshot().totals, { handOvers: 3, opened: 1, checkouts: 4, invalidated: 0 })
    },
  )
}

test('sessions that commit again and again take turns on one connection', async (t) => {
  const relay = await buildRelay(t, database)
  const { app } = relay
  const begun = gate()
  const rounds = async (name: string) => {
    await app.db.session(async (db) => {
      for (let round = 0; round < 20; round++) {
        await add(db, name)
        if (round === 0) {
          begun.open()
          await eventually(() => app.db.snapshot().waiting === 2 || name !== 'A')
        }
        await db.commit()
      }
    })
  }
  const first = rounds('A')
  await begun.opened
  await Promise.all([first, rounds('B'), rounds('C')])
  const order = (await notesIn(database)).join('')
  t.equal(order.slice(0, 57), 'ABC'.repeat(19), 'nobody has two turns while another waits')
  t.match(app.db.snapshot().totals, { commits: 60, checkouts: 60, opened: 1 })
})

inBothModes(database, 'a commit() that fails is its own session’s, which goes on', async (t, commitOn) => {
  const written = gate()
  const goOn = gate()
  const failures: unknown[] = []
  const relay = await buildRelay(t, database, { commitOn }, (app) => {
    app.post('/twice', async ({ db }) => {
      await add(db, 'doomed A1')
      written.open()
      await goOn.opened
      await db.commit().catch((error: { code: string }) => failures.push(error.code))
      await add(db, 'A2')
    })
  })
  const twice = relay.post('/twice')
  await written.opened
  const second = await relay.enqueue('/one/B')
  goOn.open()
  t.equal((await twice).statusCode, 200)
  t.equal((await second.answer).statusCode, 200)
  t.strictSame(failures, ['23514'])
  await holds(t, database, ['B', 'A2'])
  t.match(relay.app.db.snapshot().totals, { opened: 1, commits: 2, failedCommits: 1 })
})

for (const how of ['end', 'reset'] as const) {
  inBothModes(
    database,
    `a commit() whose connection dies (${how}): the session goes on, the one behind is sent again`,
    async (t, commitOn) => {
      const written = gate()
      const goOn = gate()
      const failures: unknown[] = []
      const relay = await buildRelay(t, database, { commitOn }, (app) => {
        app.post('/twice', async ({ db }) => {
          await add(db, 'A1')
          written.open()
          await goOn.opened
          await db.commit().catch((error: { code: string }) => failures.push(error.code))
          await add(db, 'A2')
        })
      })
      const twice = relay.post('/twice')
      await written.opened
      const second = await relay.enqueue('/one/B')
      relay.proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, how)
      goOn.open()
      t.equal((await twice).statusCode, 200)
      t.equal((await second.answer).statusCode, 200)
      t.strictSame(failures, [UNKNOWN.code])
      await holds(t, database, ['B', 'A2'])
      t.match(relay.app.db.snapshot().totals, { opened: 2, commits: 2, failedCommits: 1, replays: 1 })
    },
  )
}

inBothModes(
  database,
  'the client leaves while a commit() by hand is unanswered: it stands, and what follows is refused',
  async (t, commitOn) => {
    const written = gate()
    const said = gate<unknown[]>()
    const relay = await buildRelay(t, database, { commitOn }, (app) => {
      app.post('/twice', async ({ db }) => {
        await add(db, 'slow A1')
        written.open()
        const committed = await db.commit().then(
          () => 'committed',
          (error: { code: string }) => error.code,
        )
        const went = await add(db, 'A2').catch((error: { code: string }) => error.code)
        said.open([committed, went])
      })
    })
    const ice = await freeze(t, database)
    const client = (await openHttp(t, relay.app)).send('POST', '/twice')
    await written.opened
    const second = relay.post('/one/B')
    await ice.frozen()
    await handedOver(relay)
    client.destroy()
    await eventually(() => relay.gone() === 1)
    await ice.thaw()
    t.equal((await second).statusCode, 200)
    t.strictSame(await said.opened, ['committed', 'FST_REQUEST_DB_SESSION_ENDED'])
    await holds(t, database, ['slow A1', 'B'])
    t.match(relay.app.db.snapshot().totals, { cancels: 0, opened: 1, invalidated: 0 })
  },
)

for (const isFollowed of [true, false]) {
  const whose = isFollowed ? 'the next one’s transaction' : 'a transaction of its own'
  test(`a session is used again before the ROLLBACK after its overdue commit() is answered: never in ${whose}`, async (t) => {
    const refused = gate()
    const again = gate()
    const relay = await buildRelay(t, database, { pool: { timeoutMillis: 600 } }, (app) => {
      app.post('/again', async ({ db }) => {
        await add(db, 'B1').catch(() => {})
        const overdue = db.commit().catch(() => {})
        refused.open()
        await again.opened
        // By now its ROLLBACK is on its way. What comes may be refused, or kept in a transaction that is B's own.
        void add(db, 'B2').catch(() => {})
        await overdue
        await add(db, 'B3').catch(() => {})
        throw new Error('mine')
      })
    })
    const { app, proxy } = relay
    const committed = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const rolledBack = proxy.trap({ from: 'server', type: 'C', text: 'ROLLBACK' }, 'hold')
    const first = await relay.hold('A')
    first.letGo()
    await committed.sprung
    const second = relay.post('/again')
    await refused.opened
    await eventually(() => app.db.snapshot().totals.timeouts === 1)
    const third = isFollowed ? await relay.enqueue('/begun/C') : undefined
    committed.release()
    await rolledBack.sprung
    again.open()
    if (isFollowed) await handedOver(relay, 5)
    rolledBack.release()
    t.equal((await first.answer).statusCode, 200)
    t.equal((await second).statusCode, 500)
    if (third) t.equal((await third.answer).statusCode, 200)
    await holds(t, database, isFollowed ? ['A', 'C'] : ['A'])
    t.match(app.db.snapshot(), { open: 1, totals: { opened: 1, invalidated: 0 } })
  })
}

test('a stream that is left while COMMIT is unanswered sends nothing any more', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 2 }, settleTimeoutMillis: 20_000 })
  const { app, proxy } = relay
  await database.query("insert into notes (note) select 'x' from generate_series(1, 10)")
  const other = await relay.hold('other')
  const lock = await database.client()
  await app.db.session(async (db) => {
    const rows = db.selectFrom('notes').selectAll().stream(2)[Symbol.asyncIterator]()
    await rows.next()
    const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const committed = db.commit()
    await held.sprung
    // B's INSERT will wait for the lock, and everything behind it too.
    const locked = lock.query('begin; lock table notes in share mode')
    await eventually(async () => (await database.query('select from pg_locks where not granted')).length === 1)
    const second = relay.post('/one/B')
    await handedOver(relay, 4)
    proxy.clear()
    await rows.return?.()
    other.letGo()
    await other.answer
    await locked
    const begins = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
    held.release()
    await committed
    const again = pidOf(db)
    await begins.sprung
    await lock.query('rollback')
    t.equal((await second).statusCode, 200)
    begins.release()
    t.ok(await again)
    t.equal(db.state, 'begun')
  })
  t.notOk(
    proxy.flights.some(({ messages }) => messages.includes('C')),
    'no portal is closed on another’s turn',
  )
  t.match(app.db.snapshot().totals, { opened: 2, invalidated: 0, failedCommits: 0 })
})

inBothModes(
  database,
  'a commit() that nobody awaits comes before the answer, whoever is behind',
  async (t, commitOn) => {
    const written = gate()
    const goOn = gate()
    const relay = await buildRelay(t, database, { commitOn }, (app) => {
      app.post('/unawaited', async ({ db }) => {
        await add(db, 'A')
        written.open()
        await goOn.opened
        void db.commit()
        return 'kept'
      })
    })
    const held = relay.proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const first = relay.post('/unawaited')
    await written.opened
    const second = await relay.enqueue('/one/B')
    goOn.open()
    await handedOver(relay)
    let isAnswered = false
    void first.then(() => {
      isAnswered = true
    })
    await held.sprung
    t.equal(isAnswered, commitOn === 'onResponse')
    held.release()
    t.equal((await first).statusCode, 200)
    t.equal((await second.answer).statusCode, 200)
    await holds(t, database, ['A', 'B'])
  },
)

test('transactions of fastify.db.kysely follow, and are followed', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  await app.db.ping()
  proxy.clear()
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const transaction = (note: string) =>
    app.db.kysely.transaction().execute(async (trx) => {
      await trx.insertInto('notes').values({ note }).execute()
      if (note === 'bad') await sql`select 1/0`.execute(trx)
    })
  const outcomes = Promise.allSettled(['a', 'bad', 'b', 'c'].map(transaction))
  await held.sprung
  await eventually(() => app.db.snapshot().totals.handOvers === 1)
  held.release()
  t.match(await outcomes, [{ status: 'fulfilled' }, { reason: { code: '22012' } }, {}, { status: 'fulfilled' }])
  await holds(t, database, ['a', 'b', 'c'])
  t.match(app.db.snapshot().totals, { opened: 1, handOvers: 3, commits: 3, rollbacks: 1 })
})

test('a transaction of fastify.db.kysely that follows a COMMIT which dies is sent again', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
  const transaction = (note: string) =>
    app.db.kysely.transaction().execute((trx) => trx.insertInto('notes').values({ note }).execute())
  const outcomes = await Promise.allSettled([transaction('a'), transaction('b')])
  t.match(outcomes, [{ reason: UNKNOWN }, { status: 'fulfilled' }])
  await holds(t, database, ['b'])
  t.match(app.db.snapshot().totals, { replays: 1, handOvers: 1 })
})
