import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, {
  sql: `${NOTES}; alter table notes add constraint notes_once unique (note) deferrable initially deferred`,
})
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('the state and inTransaction at every moment', async (t) => {
  let kept: Session | undefined
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    kept = db
    const is = (state: string, inTransaction: boolean, when: string) =>
      t.strictSame([db.state, db.inTransaction], [state, inTransaction], when)
    is('idle', false, 'at first')
    const held = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
    const begun = db.begin()
    await held.sprung
    is('begun', false, 'while BEGIN is on its way')
    held.release()
    await begun
    is('begun', true, 'once it is answered')
    await db.commit()
    is('idle', false, 'after commit()')
    await insert(db, 'a')
    is('begun', true, 'after a statement')
    await db.rollback()
    is('idle', false, 'after rollback()')
    await t.rejects(sql`select 1 / 0`.execute(db))
    is('failed', true, 'after a statement that failed')
    await db.rollback()
    is('idle', false, 'after its rollback()')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame([kept?.state, kept?.inTransaction], ['ended', false], 'after the request')
})

test('rollback() and a 200: nothing is kept', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await db.rollback()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), [])
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`what was committed by hand is kept although the request fails later (${commitOn})`, async (t) => {
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'A')
        await db.commit()
        await insert(db, 'B')
        throw new Error('mine')
      },
      { commitOn },
    )
    t.match((await post()).json(), { statusCode: 500, message: 'mine' })
    t.strictSame(await notes(), ['A'])
  })

  test(`what was committed by hand is kept under an answer of 409 (${commitOn})`, async (t) => {
    const { post } = await oneRoute(
      t,
      database,
      async (db, _request, reply) => {
        await insert(db, 'A')
        await db.commit()
        await insert(db, 'B')
        reply.code(409)
        return 'conflict'
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 409)
    t.strictSame(await notes(), ['A'])
  })
}

test('commit, rollback and commit again: each ends its own transaction', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'A')
    await db.commit()
    await insert(db, 'B')
    await db.rollback()
    await insert(db, 'C')
    await db.commit()
    await insert(db, 'D')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'C', 'D'])
  t.match(proxy.statements(), [
    ['BEGIN', /^insert/],
    ['COMMIT'],
    ['BEGIN', /^insert/],
    ['ROLLBACK'],
    ['BEGIN', /^insert/],
    ['COMMIT'],
    ['BEGIN', /^insert/],
    ['COMMIT'],
  ])
})

test('commit() gives the connection back, so that another session may have it', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db, { server }) => {
      await insert(db, 'A')
      await db.commit()
      t.match(server.db.snapshot(), { checkedOut: 0, idle: 1 })
      await server.db.session((own) => insert(own, 'B'))
      await insert(db, 'C')
      await db.rollback()
      t.match(server.db.snapshot(), { checkedOut: 0, idle: 1 })
      return 'ok'
    },
    { pool: { size: 1, timeoutMillis: 300 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
})

test('begin() sends BEGIN alone, and a second begin() is refused', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await db.begin()
    await t.rejects(db.begin(), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
    await insert(db, 'A')
    await t.rejects(db.begin(), { code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
    await insert(db, 'B')
    await db.commit()
    await db.begin()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
  t.match(proxy.statements(), [['BEGIN'], [/^insert/], [/^insert/], ['COMMIT'], ['BEGIN'], ['COMMIT']])
})

test('of two begin() side by side one is refused', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const settled = await Promise.allSettled([db.begin(), db.begin()])
    t.match(settled, [{ status: 'fulfilled' }, { reason: { code: 'FST_REQUEST_DB_NESTED_CONFLICT' } }])
    await insert(db, 'A')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('commit() of a transaction that has failed rejects, nothing is kept, and the session can be used again', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await t.rejects(sql`select 1 / 0`.execute(db))
    await t.rejects(insert(db, 'B'), { code: '25P02' })
    await t.rejects(db.commit(), { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED', statusCode: 500 })
    t.equal(db.state, 'idle')
    await insert(db, 'C')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['C'])
})

test('commit() that PostgreSQL refuses rejects with its code and cause, and the session can be used again', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'twice')
    await insert(db, 'twice')
    const error = await db.commit().catch((error: unknown) => error)
    t.match(error, { code: '23505', statusCode: 500, cause: { constraint: 'notes_once', severity: 'ERROR' } })
    t.equal(db.state, 'idle')
    await insert(db, 'once')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['once'])
})

test('commit() and rollback() nobody awaits come before the answer', async (t) => {
  let how: 'commit' | 'rollback' = 'commit'
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, how)
    void db[how]()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  how = 'rollback'
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['commit'])
})

test('a commit() that fails and that nobody awaits does not pass for a success', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'twice')
    await insert(db, 'twice')
    db.commit().catch(() => {})
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: '23505' })
  t.strictSame(await notes(), [])
})

test('two commit() side by side, and a commit() beside a rollback(): one after the other', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'A')
    await Promise.all([db.commit(), db.commit()])
    await insert(db, 'B')
    await Promise.all([db.rollback(), db.commit()])
    await insert(db, 'C')
    await Promise.all([db.commit(), db.rollback()])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'C'])
  t.strictSame(
    proxy
      .statements()
      .flat()
      .filter((text) => /^(COMMIT|ROLLBACK)/.test(text)),
    ['COMMIT', 'ROLLBACK', 'COMMIT'],
  )
})

test('a statement issued while commit() is under way begins the next transaction', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'A')
    const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const committed = db.commit()
    await held.sprung
    const next = insert(db, 'B')
    const nested = db.transaction().execute((trx) => insert(trx, 'C'))
    await database.query('select 1')
    t.equal(proxy.flights.length, 2)
    held.release()
    await Promise.all([committed, next, nested])
    await db.rollback()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test('statements under way when commit() is called are in what is committed', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    const pending = Promise.all([insert(db, 'B'), insert(db, 'C')])
    // Kysely takes a few turns to compile; once they are on their way COMMIT comes behind them.
    await new Promise((resolve) => setImmediate(resolve))
    await db.commit()
    await pending
    throw new Error('mine')
  })
  t.equal((await post()).statusCode, 500)
  t.strictSame((await notes()).sort(), ['A', 'B', 'C'])
})

test('after the end begin, commit and rollback are refused', async (t) => {
  let kept: Session | undefined
  const { post, app } = await oneRoute(t, database, async (db) => {
    kept = db
    await insert(db, 'A')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  const { checkouts } = app.db.snapshot().totals
  for (const call of ['begin', 'commit', 'rollback'] as const) {
    await t.rejects(kept![call](), { code: 'FST_REQUEST_DB_SESSION_ENDED' }, call)
  }
  t.equal(app.db.snapshot().totals.checkouts, checkouts)
})

test('rollback() cancels what is still running', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    const sleeping = sql`select pg_sleep(30)`.execute(db)
    const failed = t.rejects(sleeping, { code: '57014' })
    await new Promise((resolve) => setImmediate(resolve))
    await db.rollback()
    await failed
    t.equal(db.state, 'idle')
    await insert(db, 'B')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['B'])
  t.match(app.db.snapshot().totals, { cancels: 1 })
})
