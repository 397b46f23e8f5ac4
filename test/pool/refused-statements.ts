import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { buildRelay, RELAY, type Relay } from '../support/relay.ts'
import { type Test, t, test } from '../support/test.ts'

// What a session sent, and was refused for want of a connection, is not passed over when it commits.

const database = await createDatabase(t, { sql: RELAY })

const TIMEOUT = 'FST_REQUEST_DB_POOL_TIMEOUT'

/** Where a session waits: in the queue, or behind a COMMIT. `free` lets those before it go. */
const PLACES = {
  queue: async (relay: Relay) => {
    const first = await relay.hold('A')
    return async () => {
      first.letGo()
      await first.answer
    }
  },
  behind: async (relay: Relay) => {
    const held = relay.proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const first = await relay.hold('A')
    first.letGo()
    await held.sprung
    return async () => {
      held.release()
      await first.answer
    }
  },
}

/** Runs `handler` in a request that begins while another has the only connection, until long after it was refused. */
async function visit(
  t: Test,
  commitOn: 'onSend' | 'onResponse',
  place: keyof typeof PLACES,
  handler: (db: Session, free: () => Promise<void>) => Promise<unknown>,
): Promise<{ statusCode: number; code: string | undefined }> {
  const ready = gate<() => Promise<void>>()
  const relay = await buildRelay(t, database, { commitOn, pool: { timeoutMillis: 150 } }, (app) => {
    app.post('/', async ({ db }) => {
      await handler(db, await ready.opened)
      return 'kept'
    })
  })
  const free = await PLACES[place](relay)
  ready.open(free)
  const answer = relay.post('/')
  await eventually(() => relay.app.db.snapshot().totals.timeouts > 0)
  await free()
  const { statusCode, body } = await answer
  await eventually(() => relay.app.db.snapshot().checkedOut === 0)
  // Of an answer that had left, the log tells what became of it.
  const complaint = relay.log.problems().find(({ err }) => err !== undefined)?.err?.code
  return { statusCode, code: statusCode === 200 ? complaint : JSON.parse(body).code }
}

for (const place of ['queue', 'behind'] as const) {
  inBothModes(
    database,
    `${place}: what nobody awaited is refused while the commit waits for it`,
    async (t, commitOn) => {
      const { code } = await visit(t, commitOn, place, async (db) => {
        void add(db, 'B').catch(() => {})
      })
      t.equal(code, TIMEOUT)
      await holds(t, database, ['A'])
    },
  )

  inBothModes(database, `${place}: then what was added behind it is not kept without it`, async (t, commitOn) => {
    const { code } = await visit(t, commitOn, place, async (db) => {
      void add(db, 'B1').catch(() => {})
      db.add(db.insertInto('notes').values({ note: 'B2' }))
    })
    t.equal(code, TIMEOUT)
    await holds(t, database, ['A'])
  })

  inBothModes(database, `${place}: a commit() by hand says so too`, async (t, commitOn) => {
    const codes: string[] = []
    await visit(t, commitOn, place, async (db) => {
      void add(db, 'B').catch(() => {})
      await db.commit().catch(({ code }) => codes.push(code))
    })
    t.strictSame(codes, [TIMEOUT])
    await holds(t, database, ['A'])
  })

  inBothModes(
    database,
    `${place}: a deferred write refused with a statement is missed by the commit`,
    async (t, commitOn) => {
      const { code } = await visit(t, commitOn, place, async (db, free) => {
        db.add(db.insertInto('notes').values({ note: 'B1' }))
        // The app can do without this answer; of the write that left with it, it is not told.
        await db
          .selectFrom('notes')
          .selectAll()
          .execute()
          .catch(() => {})
        await free()
        await add(db, 'B2')
      })
      t.ok(code, 'a failing write fails the request')
      await holds(t, database, ['A'])
    },
  )

  inBothModes(database, `${place}: who has heard of it and goes on is served`, async (t, commitOn) => {
    const said = await visit(t, commitOn, place, async (db, free) => {
      await add(db, 'B1').catch(() => {})
      await free()
      await add(db, 'B2')
    })
    t.strictSame(said, { statusCode: 200, code: undefined })
    await holds(t, database, ['A', 'B2'])
  })
}

test('the answer to COMMIT is the last that is heard: who has sent its own COMMIT behind it is told in time', async (t) => {
  await database.query('delete from notes')
  const relay = await buildRelay(t, database, { settleTimeoutMillis: 300 })
  const { app, proxy } = relay
  const first = await relay.hold('A')
  const second = await relay.enqueue('/added/B')
  const third = await relay.enqueue('/one/C')
  proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'swallow')
  const since = performance.now()
  first.letGo()
  t.equal((await first.answer).statusCode, 200)
  // A way out for the test: the library has to be done long before.
  const cut = setTimeout(() => proxy.cut('reset'), 4000)
  t.match((await second.answer).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  t.ok(performance.now() - since < 1500, `after ${performance.now() - since} ms`)
  t.match((await third.answer).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }, 'it was next')
  clearTimeout(cut)
  // Its COMMIT was run.
  await holds(t, database, ['A', 'B', 'B'])
  t.match(app.db.snapshot().totals, { opened: 1, invalidated: 1, replays: 0 })
})
