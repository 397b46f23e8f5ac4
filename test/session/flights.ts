import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { type Handler, type OneRouteOptions, oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { type PostgresProxy, startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

t.beforeEach(() => database.query('truncate notes restart identity'))

const throughProxy = (t: Test, handler: Handler, options?: OneRouteOptions) =>
  oneRouteThroughProxy(t, database, handler, options)

const messagesOf = ({ flights }: PostgresProxy) => flights.map(({ messages }) => messages)

test('a request that reads once sends two flights, each in one write', async (t) => {
  const { post, proxy } = await throughProxy(t, (db) => db.selectFrom('notes').selectAll().execute())
  t.equal((await post()).statusCode, 200)
  t.strictSame(proxy.statements(), [['BEGIN', 'select * from "notes"'], ['COMMIT']])
  t.strictSame(messagesOf(proxy), ['PBEHPBDES', 'PBES'])
  t.equal(proxy.roundTrips(), 2)
  t.strictSame(
    proxy.flights.map(({ chunks }) => chunks),
    [1, 1],
  )
})

test('a request that only adds sends one flight', async (t) => {
  const { post, proxy } = await throughProxy(t, (db) => {
    db.add(db.insertInto('notes').values({ note: 'first' }))
    db.add(db.insertInto('notes').values({ note: 'second' }))
    return { added: 2 }
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^insert/, /^insert/, 'COMMIT']])
  t.strictSame(messagesOf(proxy), ['PBEHPBDEPBDEPBES'])
  t.equal(proxy.roundTrips(), 1)
  t.match(await database.rows('notes'), [{ note: 'first' }, { note: 'second' }])
})

test('a nested transaction takes a flight for its savepoint, and one for its release', async (t) => {
  const { post, proxy } = await throughProxy(t, async (db) => {
    await db.transaction().execute((db) => db.insertInto('notes').values({ note: 'kept' }).execute())
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^SAVEPOINT/], [/^insert/], [/^RELEASE/], ['COMMIT']])
})

test('settings ride in the first flight, between BEGIN and the statement', async (t) => {
  const { post, proxy } = await throughProxy(
    t,
    (db) => sql`select current_setting('app.tenant') as tenant`.execute(db),
    { settings: () => ({ 'app.tenant': 'acme' }), statementTimeoutMillis: 700 },
  )
  t.match((await post()).json(), { rows: [{ tenant: 'acme' }] })
  t.match(proxy.statements(), [['BEGIN', /^SELECT set_config.*, set_config/, /current_setting/], ['COMMIT']])
  t.equal(proxy.roundTrips(), 2)
})

test('settings ride in the one flight of a request that only adds', async (t) => {
  const { post, proxy } = await throughProxy(
    t,
    (db) => {
      db.add(db.insertInto('notes').values({ note: sql`current_setting('app.tenant')` }))
      return 'ok'
    },
    { settings: () => ({ 'app.tenant': 'acme' }) },
  )
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^SELECT set_config/, /^insert/, 'COMMIT']])
  t.match(await database.rows('notes'), [{ note: 'acme' }])
})

test('first statements issued together leave under one Sync, behind one BEGIN', async (t) => {
  const { post, proxy, app } = await throughProxy(t, (db) =>
    Promise.all([1, 2, 3, 4, 5].map((n) => sql`select ${n}::int as n, pg_backend_pid() as pid`.execute(db))),
  )
  const checkouts = app.db.snapshot().totals.checkouts
  const answers = (await post()).json() as { rows: { n: number; pid: number }[] }[]
  t.strictSame(
    answers.map(({ rows }) => rows[0]?.n),
    [1, 2, 3, 4, 5],
  )
  t.equal(new Set(answers.map(({ rows }) => rows[0]?.pid)).size, 1)
  t.equal(app.db.snapshot().totals.checkouts, checkouts + 1)
  t.match(
    proxy.statements().map((flight) => flight.length),
    [6, 1],
  )
  t.strictSame(messagesOf(proxy), [`PBEH${'PBDE'.repeat(5)}S`, 'PBES'])
})

test('a first statement nobody awaits is committed with the answer, never after it', async (t) => {
  const { post, proxy } = await throughProxy(t, (db) => {
    void db.insertInto('notes').values({ note: 'kept' }).execute()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'kept' }])
  const sent = proxy.statements().flat()
  t.match(sent, ['BEGIN', /^insert/, 'COMMIT'])
})

test('what is issued after the first flight has left waits for the answer to BEGIN', async (t) => {
  const { post, proxy } = await throughProxy(t, async (db) => {
    const held = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
    const first = sql`select 1 as one`.execute(db)
    await held.sprung
    const second = sql`select 2 as two`.execute(db)
    db.add(db.insertInto('notes').values({ note: 'deferred' }))
    // A turn around the loopback, in which a statement that did not wait would have arrived.
    await database.query('select 1')
    t.equal(proxy.flights.length, 1, 'nothing follows the first flight')
    held.release()
    return [await first, await second]
  })
  t.match((await post()).json(), [{ rows: [{ one: 1 }] }, { rows: [{ two: 2 }] }])
  t.match(proxy.statements(), [['BEGIN', 'select 1 as one'], ['select 2 as two'], [/^insert/, 'COMMIT']])
})

test('BEGIN is answered before the first statement is done, so a second statement need not wait for that', async (t) => {
  const locker = await database.client()
  await locker.query('select pg_advisory_lock(1)')
  const { post, proxy } = await throughProxy(t, async (db) => {
    const first = sql`select pg_advisory_xact_lock(1)`.execute(db)
    await eventually(() => db.inTransaction)
    const second = sql`select 2 as two`.execute(db)
    await eventually(() => proxy.flights.length === 2)
    t.equal(proxy.flights[0]?.status, undefined, 'the first statement still runs')
    await locker.query('select pg_advisory_unlock(1)')
    await first
    return second
  })
  t.match((await post()).json(), { rows: [{ two: 2 }] })
  t.match(proxy.statements(), [['BEGIN', /advisory/], ['select 2 as two'], ['COMMIT']])
})

test('after the first flight each statement has its own Sync', async (t) => {
  const { post, proxy } = await throughProxy(t, async (db) => {
    await sql`select 0`.execute(db)
    const settled = await Promise.allSettled([
      sql`select 1`.execute(db),
      sql`select 2`.execute(db),
      sql`select 3`.execute(db),
    ])
    return settled.map(({ status }) => status)
  })
  t.strictSame((await post()).json(), ['fulfilled', 'fulfilled', 'fulfilled'])
  t.strictSame(messagesOf(proxy), ['PBEHPBDES', 'PBDES', 'PBDES', 'PBDES', 'PBES'])
})

test('what the server skipped of a first flight rejects as aborted, what came before has its answer', async (t) => {
  const { post, proxy } = await throughProxy(t, async (db) => {
    const settled = await Promise.allSettled([
      sql`select 1 as one`.execute(db),
      sql`select 1 / 0`.execute(db),
      sql`select 3`.execute(db),
    ])
    t.match(settled[0], { status: 'fulfilled', value: { rows: [{ one: 1 }] } })
    t.match(settled[1], { status: 'rejected', reason: { code: '22012' } })
    t.match(settled[2], {
      status: 'rejected',
      reason: { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED', cause: { code: '22012' } },
    })
    return 'went on'
  })
  const answer = await post()
  t.equal(answer.statusCode, 500)
  t.equal(answer.json().code, 'FST_REQUEST_DB_TRANSACTION_ABORTED')
  t.equal(proxy.flights[0]?.status, 'E')
})

test('a first statement that fails costs the flight and a ROLLBACK', async (t) => {
  const { post, proxy } = await throughProxy(t, (db) => sql`select 1 / 0`.execute(db))
  t.match((await post()).json(), { statusCode: 500, code: '22012' })
  await eventually(() => proxy.flights.at(-1)?.statements[0] === 'ROLLBACK')
  t.strictSame(proxy.statements(), [['BEGIN', 'select 1 / 0'], ['ROLLBACK']])
})

test('a session that is looked at but never used sends nothing and opens nothing', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const handler: Handler = (db, request, reply) => {
    const before = [reply.raw.listenerCount('close'), request.raw.socket.listenerCount('close')]
    const { state, inTransaction } = db
    db.selectFrom('notes').selectAll().compile()
    db.withSchema('public').withoutPlugins()
    const after = [reply.raw.listenerCount('close'), request.raw.socket.listenerCount('close')]
    t.strictSame(after, before, 'no listener is added')
    return { state, inTransaction }
  }
  const { post, app } = await oneRoute(t, database, handler, { connectionString: proxy.connectionString })
  t.strictSame((await post()).json(), { state: 'idle', inTransaction: false })
  t.strictSame(proxy.recordings, [])
  t.match(app.db.snapshot(), { open: 0, totals: { checkouts: 0 } })
})

test('commit, rollback and flush of a session with nothing to do send nothing', async (t) => {
  const { post, proxy } = await throughProxy(t, async (db) => {
    await db.flush()
    await db.commit()
    await db.rollback()
    await db.commit()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(proxy.statements(), [])
})

test('callbacks alone send nothing', async (t) => {
  const called: string[] = []
  const { post, proxy } = await throughProxy(t, (db) => {
    db.afterCommit(() => called.push('commit'))
    db.afterRollback(() => called.push('rollback'))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(proxy.statements(), [])
  t.strictSame(called, ['commit'])
})

for (const isolationLevel of ['read committed', 'repeatable read'] as const) {
  test(`a read-only session at ${isolationLevel} does not wait for the answer to its COMMIT`, async (t) => {
    const { post, proxy, app } = await throughProxy(t, (db) => sql`select 1 as one`.execute(db), {
      readOnly: true,
      isolationLevel,
    })
    const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
    const answer = await post()
    t.match(answer.json(), { rows: [{ one: 1 }] })
    await held.sprung
    t.strictSame(proxy.statements()[1], ['COMMIT'])
    t.equal(app.db.snapshot().checkedOut, 1, 'the connection is busy until COMMIT is answered')
    held.release()
  })
}

test('a session that may write waits for the answer to its COMMIT', async (t) => {
  const { post, proxy } = await throughProxy(t, (db) => sql`select 1 as one`.execute(db))
  const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  let answered = false
  const answer = post().then((response) => {
    answered = true
    return response
  })
  await held.sprung
  await database.query('select 1')
  t.equal(answered, false)
  held.release()
  t.equal((await answer).statusCode, 200)
})
