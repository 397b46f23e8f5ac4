import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, verbs } from '../support/notebook.ts'
import { buildRelay, freeze, RELAY } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// Who was refused behind an unanswered COMMIT is where it would be after a refusal in the queue: it holds nothing, and
// can ask again.

const database = await createDatabase(t, { sql: RELAY })
t.beforeEach(async () => void (await database.query('delete from notes')))

const TIMEOUT = { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' }

inBothModes(database, 'who catches it may ask again, as a newcomer', async (t, commitOn) => {
  const told = gate()
  const relay = await buildRelay(t, database, { commitOn, pool: { timeoutMillis: 400 } }, (app) => {
    app.post('/stubborn/:note', async ({ db }) => {
      await t.rejects(add(db, 'lost'), { code: TIMEOUT.code })
      t.equal(db.state, 'idle')
      t.equal(db.inTransaction, false)
      told.open()
      await db.transaction().execute((trx) => trx.insertInto('notes').values({ note: 'B' }).execute())
      return 'kept'
    })
  })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/stubborn/B')
  first.letGo()
  await answered.sprung
  await told.opened
  await eventually(() => app.db.snapshot().waiting === 1)
  answered.release()
  t.equal((await second.answer).statusCode, 200)
  t.equal((await first.answer).statusCode, 200)
  await holds(t, database, ['A', 'B'])
  t.strictSame(verbs(proxy).slice(2, 5), [['BEGIN', 'INSERT'], ['ROLLBACK'], ['BEGIN', 'SAVEPOINT']])
  t.match(app.db.snapshot(), { idle: 1, totals: { timeouts: 1, opened: 1, invalidated: 0, commits: 2, rollbacks: 1 } })
})

/** What may be made of a refusal, and whether the answer to it can be 200. */
const REACTIONS: { name: string; react: (db: Session) => Promise<unknown>; status: number }[] = [
  {
    name: 'answers without it',
    react: (db) => add(db, 'lost').catch(() => {}),
    status: 200,
  },
  {
    name: 'has not listened',
    react: async (db) => void add(db, 'lost').catch(() => {}),
    status: 503,
  },
  {
    name: 'has not listened, and has added something',
    react: async (db) => {
      void add(db, 'lost').catch(() => {})
      db.add(db.insertInto('notes').values({ note: 'half' }))
    },
    status: 503,
  },
  {
    name: 'had added something before',
    react: async (db) => {
      db.add(db.insertInto('notes').values({ note: 'half' }))
      await add(db, 'lost').catch(() => {})
    },
    status: 503,
  },
]

for (const { name, react, status } of REACTIONS) {
  inBothModes(database, `who is overdue and ${name} ends as one who was refused in the queue`, async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn, pool: { timeoutMillis: 200 } }, (app) => {
      app.post('/reacts/:note', async ({ db }) => {
        await react(db)
        return 'fine'
      })
    })
    const { app, proxy, log } = relay
    const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const first = await relay.hold('A')
    const behind = await relay.enqueue('/reacts/B')
    const inQueue = await relay.enqueue('/reacts/C')
    first.letGo()
    await answered.sprung
    await eventually(() => app.db.snapshot().totals.timeouts === 2)
    answered.release()
    const answers = await Promise.all([behind.answer, inQueue.answer])
    await first.answer
    await holds(t, database, ['A'])
    // Where the answer had left, the log tells; in a crowd it waits even then for what was added.
    const told = answers.filter(({ statusCode }) => statusCode === 503).length
    const logged = log.problems().map(({ err }) => err?.code)
    if (commitOn === 'onSend') t.strictSame(logged, [])
    t.strictSame(
      logged.filter((code) => code !== TIMEOUT.code),
      [],
    )
    t.equal(told + logged.length, status === 503 ? 2 : 0)
  })
}

test('who was refused holds nothing: its connection is the next one’s while its handler still runs', async (t) => {
  const told = gate()
  const goOn = gate()
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 300 } }, (app) => {
    app.post('/fallback/:note', async ({ db }, reply) => {
      await t.rejects(add(db, 'lost'), { code: TIMEOUT.code })
      told.open()
      await goOn.opened
      return reply.code(503).send('from elsewhere')
    })
  })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/fallback/B')
  first.letGo()
  await answered.sprung
  await told.opened
  answered.release()
  t.equal((await first.answer).statusCode, 200)
  t.equal((await relay.post('/one/C')).statusCode, 200)
  goOn.open()
  t.equal((await second.answer).body, 'from elsewhere')
  await holds(t, database, ['A', 'C'])
  t.match(app.db.snapshot(), { idle: 1, totals: { timeouts: 1, opened: 1, invalidated: 0 } })
})

test('what an overdue session has sent is cancelled when its turn comes', async (t) => {
  const relay = await buildRelay(t, database, { pool: { timeoutMillis: 300 }, settleTimeoutMillis: 8000 }, (app) => {
    app.post('/sleeps/:note', ({ db }) => Promise.all([add(db, 'lost'), sql`select pg_sleep(60)`.execute(db)]))
  })
  const { app, proxy } = relay
  const ice = await freeze(t, database)
  const first = await relay.hold('slow A')
  const second = await relay.enqueue('/sleeps/B')
  first.letGo()
  const pid = await ice.frozen()
  t.match((await second.answer).json(), TIMEOUT)
  const third = await relay.enqueue('/one/C')
  t.strictSame(proxy.cancels, [])
  await ice.thaw()
  t.equal((await first.answer).statusCode, 200)
  t.equal((await third.answer).statusCode, 200)
  t.strictSame(proxy.cancels, [pid])
  await holds(t, database, ['slow A', 'C'])
  t.match(app.db.snapshot().totals, { timeouts: 1, cancels: 1, opened: 1, invalidated: 0 })
})

test('the connection of a refusal that is slow to be undone does not count as held by who goes on', async (t) => {
  const options = { maxSessionMillis: 400, settleTimeoutMillis: 8000, pool: { size: 2, timeoutMillis: 200 } }
  const inHand = gate()
  const goOn = gate()
  const relay = await buildRelay(t, database, options, (app) => {
    app.post('/again/:note', async ({ db }) => {
      const sleeps = sql`select pg_sleep(60)`.execute(db)
      await t.rejects(Promise.all([add(db, 'lost'), sleeps]), { code: TIMEOUT.code })
      await goOn.opened
      await add(db, 'B')
      inHand.open()
      await eventually(() => performance.now() - since > 600)
      return 'kept'
    })
  })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const cancel = proxy.trap({ from: 'client', type: 'cancel' }, 'hold')
  let since = performance.now()
  const other = await relay.hold('D')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/again/B')
  first.letGo()
  await answered.sprung
  await eventually(() => app.db.snapshot().totals.timeouts === 1)
  other.letGo()
  t.equal((await other.answer).statusCode, 200)
  since = performance.now()
  answered.release()
  await cancel.sprung
  await eventually(() => performance.now() - since > 250)
  goOn.open()
  await inHand.opened
  t.equal((await second.answer).statusCode, 200, 'it has had its own connection for less than maxSessionMillis')
  cancel.release()
  t.equal((await first.answer).statusCode, 200)
  await holds(t, database, ['D', 'A', 'B'])
})
