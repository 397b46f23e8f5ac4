import { sql } from 'kysely'
import type { RequestDbOptions, RouteDbOptions, Session, SessionOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { holds, inBothModes } from '../../support/modes.ts'
import { add, pidOf, terminate, verbs } from '../../support/notebook.ts'
import { type Handler, oneRouteThroughProxy } from '../../support/one-route.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/*
 * The scenarios of SQLAlchemy's test/engine/test_transaction.py and test/orm/test_transaction.py. Those that do not apply:
 * - two-phase transactions, autocommit by the text of a statement, nesting without savepoints, closing a transaction object
 *   apart from its session, objects and their expiry: there is nothing like it;
 * - a ROLLBACK or RELEASE that the driver refuses to send: ours fail with the connection, or with the transaction.
 */

const database = await createDatabase(t, { sql: NOTES })
const LOST = { code: 'FST_REQUEST_DB_CONNECTION_LOST' }

/** A plan of savepoints: a string is a row, a list a nested transaction; one that ends in `undo` is rolled back. */
type Plan = readonly (string | Plan)[]
const UNDO = 'undo'

async function carryOut(db: Session, plan: Plan): Promise<void> {
  for (const part of plan) {
    if (part === UNDO) throw new Error(UNDO)
    if (typeof part === 'string') await add(db, part)
    else {
      const nested = db.transaction().execute(() => carryOut(db, part))
      await nested.catch((error) => {
        if (error.message !== UNDO) throw error
      })
    }
  }
}

/** What a plan keeps. */
function keeps(plan: Plan): string[] {
  if (plan.includes(UNDO)) return []
  return plan.flatMap((part) => (typeof part === 'string' ? [part] : keeps(part)))
}

const PLANS: Record<string, Plan> = {
  'one that is kept': ['a', ['b'], 'c'],
  'one that is undone': ['a', ['b', UNDO], 'c'],
  'two after each other, the first undone': ['a', ['b', UNDO], ['c'], 'd'],
  'a kept one in an undone one': ['a', ['b', ['c'], UNDO], 'd'],
  'an undone one in a kept one': ['a', ['b', ['c', UNDO], 'd'], 'e'],
  'four levels, the second undone': ['a', ['b', ['c', ['d', ['e']]], UNDO], 'f'],
  'four levels, each second undone': ['a', ['b', ['c', ['d', ['e', UNDO], 'f'], UNDO], 'g', ['h']], 'i'],
}

for (const [name, plan] of Object.entries(PLANS)) {
  inBothModes(database, `savepoints: ${name}`, async (t, commitOn) => {
    const handler: Handler = (db) => carryOut(db, plan).then(() => 'kept')
    const { app, post } = await oneRouteThroughProxy(t, database, handler, { commitOn })
    t.equal((await post()).statusCode, 200)
    await holds(t, database, keeps(plan))
    t.match(app.db.snapshot().totals, { commits: 1, failedCommits: 0, opened: 1 })
  })
}

inBothModes(
  database,
  'a savepoint that cannot be released, because an error was swallowed in it, is undone and no more',
  async (t, commitOn) => {
    const handler: Handler = async (db) => {
      await add(db, 'before')
      const nested = db.transaction().execute(async (trx) => {
        await trx.insertInto('notes').values({ note: 'lost' }).execute()
        await sql`select 1/0`.execute(trx).catch(() => {})
      })
      await t.rejects(nested, { code: '25P02' })
      t.equal(db.state, 'begun')
      await add(db, 'after')
      return 'kept'
    }
    const { post } = await oneRouteThroughProxy(t, database, handler, { commitOn })
    t.equal((await post()).statusCode, 200)
    await holds(t, database, ['before', 'after'])
  },
)

for (const moment of ['RELEASE', 'ROLLBACK TO', 'SAVEPOINT'] as const) {
  inBothModes(
    database,
    `the connection dies at ${moment}: the first error stays visible, and nothing is kept`,
    async (t, commitOn) => {
      let seen: unknown
      const handler: Handler = async (db) => {
        await add(db, 'lost')
        const nested = db.transaction().execute(async (trx) => {
          await trx.insertInto('notes').values({ note: 'lost' }).execute()
          if (moment === 'ROLLBACK TO') throw new Error('mine')
        })
        seen = await nested.catch((error) => error)
        await add(db, 'never').catch(() => {})
        return 'no success'
      }
      const { app, proxy, post } = await oneRouteThroughProxy(t, database, handler, { commitOn })
      proxy.trap({ from: 'client', type: 'P', text: `${moment} ` }, 'reset')
      const answer = await post()
      t.match(answer.json(), LOST)
      t.match(seen, moment === 'ROLLBACK TO' ? { message: 'mine' } : LOST)
      await holds(t, database, [])
      t.match(app.db.snapshot().totals, { commits: 0, invalidated: 1, replays: 0 })
    },
  )
}

const ISOLATIONS = ['read committed', 'repeatable read', 'serializable'] as const

/** Every combination, some of them twice. */
const KINDS: readonly SessionOptions[] = ISOLATIONS.flatMap((isolationLevel) =>
  [false, true].flatMap((readOnly) => [
    { isolationLevel, readOnly },
    { isolationLevel, readOnly, deferrable: isolationLevel === 'serializable' && readOnly },
  ]),
)

for (const preparedStatements of [false, { cacheSize: 10 }] as const) {
  test(`isolation, access mode and deferrability are each session's own, however they follow each other${preparedStatements ? ', with prepared statements' : ''}`, async (t) => {
    const options: RequestDbOptions = { pool: { size: 2 }, preparedStatements }
    const app = await buildApp(t, database, options)
    await Promise.all(
      Array.from({ length: 240 }, async (_, at) => {
        const kind = at % 5 === 0 ? {} : KINDS[at % KINDS.length]!
        const { isolationLevel = 'read committed', readOnly = false, deferrable = false } = kind
        await app.db.session(kind, async (db) => {
          const { rows } = await sql<Record<string, string>>`
            select current_setting('transaction_isolation') as isolation, current_setting('transaction_read_only') as "readOnly",
              current_setting('transaction_deferrable') as deferrable`.execute(db)
          const said = [rows[0]!.isolation, rows[0]!.readOnly, rows[0]!.deferrable]
          const expected = [isolationLevel, readOnly === true ? 'on' : 'off', deferrable ? 'on' : 'off']
          if (String(said) !== String(expected)) t.strictSame(said, expected)
        })
      }),
    )
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(app.db.snapshot().totals, { commits: 240, rollbacks: 0, invalidated: 0 })
  })
}

/** Ways in which a transaction comes to no good beginning, and what the client is told. */
const BEGINNINGS: Record<string, { options: RequestDbOptions; route?: RouteDbOptions; told: object }> = {
  'the settings are refused': {
    options: { settings: () => ({ statement_timeout: 'soon' }) },
    told: { statusCode: 500, code: '22023' },
  },
  'the settings throw': {
    options: {
      settings: () => {
        throw new Error('mine')
      },
    },
    told: { statusCode: 500, message: 'mine' },
  },
}

for (const [why, { options, told }] of Object.entries(BEGINNINGS)) {
  inBothModes(database, `where ${why}, the connection goes to who waits, and nobody is hurt`, async (t, commitOn) => {
    const handler: Handler = async (db) => {
      await add(db, 'lost')
      return 'kept'
    }
    let isBad = true
    const { settings } = options
    const all: RequestDbOptions = {
      commitOn,
      pool: { size: 1 },
      settings: (request) => (isBad && settings ? settings(request) : {}),
    }
    const { app, post } = await oneRouteThroughProxy(t, database, handler, all)
    for (const answer of await Promise.all(Array.from({ length: 10 }, post))) t.match(answer.json(), told)
    isBad = false
    t.equal((await post()).statusCode, 200)
    await holds(t, database, ['lost'])
    t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { commits: 1, invalidated: 0, opened: 1 } })
  })
}

for (const times of [1, 2]) {
  inBothModes(
    database,
    `a server that hangs up at BEGIN ${times === 1 ? 'is asked once more' : 'twice is not asked a third time'}, and the place is free`,
    async (t, commitOn) => {
      const handler: Handler = async (db) => {
        await add(db, 'kept')
        return 'kept'
      }
      const { app, proxy, post } = await oneRouteThroughProxy(t, database, handler, { commitOn, pool: { size: 1 } })
      proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset', { times })
      const [first, second] = await Promise.all([post(), post()])
      t.equal(first.statusCode, times === 1 ? 200 : 503)
      if (times === 2) t.match(first.json(), LOST)
      t.equal(second.statusCode, 200)
      await holds(t, database, times === 1 ? ['kept', 'kept'] : ['kept'])
      t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { replays: 1, invalidated: times } })
    },
  )
}

/** A transaction of each kind of end, after which the next one starts from nothing. */
async function endsAnew(t: Test, db: Session, how: 'commit' | 'rollback'): Promise<void> {
  await add(db, how)
  t.equal(db.inTransaction, true)
  await db[how]()
  t.strictSame([db.inTransaction, db.state], [false, 'idle'])
}

inBothModes(
  database,
  'a session begins by itself after each commit and rollback, and sends nothing in between',
  async (t, commitOn) => {
    const handler: Handler = async (db) => {
      for (const how of ['commit', 'rollback', 'rollback', 'commit'] as const) await endsAnew(t, db, how)
      await db.commit()
      await db.rollback()
      return 'kept'
    }
    const { proxy, post } = await oneRouteThroughProxy(t, database, handler, { commitOn })
    t.equal((await post()).statusCode, 200)
    await holds(t, database, ['commit', 'commit'])
    const ends = ['COMMIT', 'ROLLBACK', 'ROLLBACK', 'COMMIT']
    t.strictSame(
      verbs(proxy),
      ends.flatMap((end) => [['BEGIN', 'INSERT'], [end]]),
    )
  },
)

inBothModes(
  database,
  'an error in the handler of an error is the one that is told, and nothing is kept',
  async (t, commitOn) => {
    const handler: Handler = async (db) => {
      await add(db, 'lost')
      try {
        await sql`select 1/0`.execute(db)
      } catch {
        await db.rollback()
        await add(db, 'lost too')
        await terminate(database, await pidOf(db))
        await add(db, 'never')
      }
    }
    const { app, post } = await oneRouteThroughProxy(t, database, handler, { commitOn })
    t.match((await post()).json(), LOST)
    await holds(t, database, [])
    t.match(app.db.snapshot().totals, { commits: 0, rollbacks: 1, invalidated: 1 })
  },
)
