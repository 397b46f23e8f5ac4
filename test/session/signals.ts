import * as kysely from 'kysely'
import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

// Kysely 0.29: execute({ signal, inflightQueryAbortStrategy }). Kysely 0.28 knows no signals.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const hasSignals = 'AbortedTransactionError' in kysely

type Strategy = 'ignore query' | 'cancel query' | 'kill session'
interface AbortOptions {
  readonly signal: AbortSignal
  readonly inflightQueryAbortStrategy?: Strategy
}
/** `execute` with the options that only 0.29 has in its types. */
const sleep = (db: Session, seconds: number, options: AbortOptions): Promise<unknown> => {
  const query = db.selectNoFrom(sql`pg_sleep(${seconds}::float8)`.as('slept'))
  return (query.execute as (options: AbortOptions) => Promise<unknown>).call(query, options)
}

async function withSignals(name: string, body: (t: Test) => Promise<void>): Promise<void> {
  if (hasSignals) await test(name, body)
  else await t.test(name, { skip: 'Kysely 0.28 knows no signals' }, async () => {})
}

const isSleeping = async () =>
  (await database.backends()).some(({ state, query }) => state === 'active' && query.includes('pg_sleep'))

t.beforeEach(() => database.query('truncate notes restart identity'))

for (const first of [true, false]) {
  withSignals(
    `64 'cancel query' stops a ${first ? 'first' : 'later'} statement on the server, and the session is doomed`,
    async (t) => {
      const { post, app } = await oneRoute(
        t,
        database,
        async (db) => {
          if (!first) await insert(db, 'a')
          const controller = new AbortController()
          const sleeping = sleep(db, 30, { signal: controller.signal, inflightQueryAbortStrategy: 'cancel query' })
          sleeping.catch(() => {})
          await eventually(isSleeping)
          const since = performance.now()
          controller.abort()
          await t.rejects(sleeping, { name: 'AbortError' })
          t.ok(performance.now() - since < 1000)
          return 'went on'
        },
        { pool: { size: 1 } },
      )
      t.match((await post()).json(), { statusCode: 500 })
      t.strictSame(await database.rows('notes'), [])
      await app.db.session((db) => insert(db, 'the pool works'))
      t.match(await database.rows('notes'), [{ note: 'the pool works' }])
    },
  )
}

withSignals("'cancel query' that comes before the answer to BEGIN still stops the statement", async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const held = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
    const controller = new AbortController()
    const sleeping = sleep(db, 30, { signal: controller.signal, inflightQueryAbortStrategy: 'cancel query' })
    sleeping.catch(() => {})
    await held.sprung
    await eventually(isSleeping)
    controller.abort()
    await t.rejects(sleeping, { name: 'AbortError' })
    held.release()
    await eventually(async () => !(await isSleeping()))
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
})

withSignals("'cancel query' in a nested transaction takes that along and no more", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const controller = new AbortController()
    await t.rejects(
      db.transaction().execute(async () => {
        await insert(db, 'b')
        const sleeping = sleep(db, 30, { signal: controller.signal, inflightQueryAbortStrategy: 'cancel query' })
        sleeping.catch(() => {})
        await eventually(isSleeping)
        controller.abort()
        await sleeping
      }),
      { name: 'AbortError' },
    )
    await insert(db, 'c')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'a' }, { note: 'c' }])
})

withSignals("'ignore query' lets the statement run, and the commit waits for it", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const controller = new AbortController()
    const sleeping = sleep(db, 0.3, { signal: controller.signal })
    sleeping.catch(() => {})
    await eventually(isSleeping)
    controller.abort()
    await t.rejects(sleeping, { name: 'AbortError' })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'a' }])
})

withSignals('a signal that is aborted already sends nothing', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    await t.rejects(sleep(db, 30, { signal: AbortSignal.abort() }), { name: 'AbortError' })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

withSignals('a signal that is aborted while the session waits for a connection', async (t) => {
  const goOn = gate()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      const controller = new AbortController()
      const sleeping = sleep(db, 30, { signal: controller.signal, inflightQueryAbortStrategy: 'cancel query' })
      sleeping.catch(() => {})
      await eventually(() => app.db.snapshot().waiting === 1)
      controller.abort()
      await t.rejects(sleeping, { name: 'AbortError' })
      throw new Error('mine')
    },
    { pool: { size: 1 } },
  )
  const holder = app.db.session(async (db) => {
    await db.begin()
    await goOn.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.match((await post()).json(), { message: 'mine' })
  t.equal(app.db.snapshot().waiting, 0)
  goOn.open()
  await holder
})

withSignals("'kill session' is refused by Kysely, or ends the connection; nothing is kept either way", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const controller = new AbortController()
    await t.rejects(async () => {
      const sleeping = sleep(db, 0.2, { signal: controller.signal, inflightQueryAbortStrategy: 'kill session' })
      setImmediate(() => controller.abort())
      await sleeping
    })
    throw new Error('mine')
  })
  t.equal((await post()).statusCode >= 500, true)
  t.strictSame(await database.rows('notes'), [])
})

withSignals('a stream whose signal is aborted closes its cursor, and the session goes on', async (t) => {
  await database.query("insert into notes (note) select 'n' from generate_series(1, 20)")
  const { post } = await oneRoute(t, database, async (db) => {
    const controller = new AbortController()
    const query = db.selectFrom('notes').select('id').orderBy('id')
    const stream = query.stream as unknown as (options: object) => AsyncIterableIterator<{ id: number }>
    const read = async () => {
      for await (const { id } of stream.call(query, { chunkSize: 1, signal: controller.signal }))
        if (id === 3) controller.abort()
    }
    await t.rejects(read(), { name: 'AbortError' })
    const { rows } = await sql`select name from pg_cursors where name <> ''`.execute(db)
    t.strictSame(rows, [])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})
