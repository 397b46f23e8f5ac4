import { sql } from 'kysely'
import type { Session } from '../lib/index.ts'
import { buildApp } from './support/app.ts'
import { captureLog } from './support/captured-log.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { holds } from './support/modes.ts'
import { add, isGone, notesIn, pidOf, terminate } from './support/notebook.ts'
import { startProxy } from './support/proxy.ts'
import { NOTES } from './support/schema.ts'
import { type Test, t, test } from './support/test.ts'

/* fastify.db: sessions outside of a request, single statements, ping and snapshot. */
const database = await createDatabase(t, {
  sql: `${NOTES};
    create table parents (id int primary key);
    create table children (parent int references parents deferrable initially deferred);`,
})

async function start(t: Test, options: Parameters<typeof buildApp>[2] = {}) {
  await database.query('delete from notes')
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, ...options })
  return { app, db: app.db, proxy }
}

test('a session commits what its function did, and answers what it returned', async (t) => {
  const { db, proxy } = await start(t)
  await db.ping()
  proxy.clear()
  const result = await db.session(async (session) => {
    t.equal(session.state, 'idle')
    await add(session, 'x')
    t.equal(session.state, 'begun')
    return 42
  })
  t.equal(result, 42)
  t.strictSame(await notesIn(database), ['x'], 'committed when the promise resolves')
  t.match(proxy.statements(), [['BEGIN', /^insert/], ['COMMIT']])
  t.equal(proxy.roundTrips(), 2)
  t.match(db.snapshot().totals, { commits: 1, rollbacks: 0, checkouts: 2 })
})

test('a session whose function throws is rolled back, and throws the same', async (t) => {
  const { db } = await start(t)
  const mine = new Error('mine')
  const thrown = await db
    .session(async (session) => {
      await add(session, 'x')
      throw mine
    })
    .catch((error) => error)
  t.equal(thrown, mine)
  t.equal(db.snapshot().checkedOut, 0, 'the connection is back when the promise rejects')
  await t.rejects(
    db.session(() => {
      throw mine
    }),
    mine,
    'also where it throws at once',
  )
  t.equal(await db.session(() => Promise.reject(null)).catch((error) => error), null, 'also where it throws nothing')
  await holds(t, database, [])
})

test('a session that is not used costs nothing', async (t) => {
  const { db, proxy } = await start(t)
  t.equal(await db.session(async () => 'nothing'), 'nothing')
  t.strictSame(proxy.recordings, [])
  t.equal(db.snapshot().totals.checkouts, 0)
})

test('a session is ended with its function', async (t) => {
  const { db } = await start(t)
  let kept: Session | undefined
  for (const fails of [false, true]) {
    await db
      .session(async (session) => {
        kept = session
        await add(session, 'x')
        if (fails) throw new Error('mine')
      })
      .catch(() => {})
    await t.rejects(add(kept!, 'late'), { code: 'FST_REQUEST_DB_SESSION_ENDED', message: /its function has/ })
    t.equal(kept?.state, 'ended')
  }
  await holds(t, database, ['x'])
})

test('commit() and rollback() by hand, and nested transactions, work as in a request', async (t) => {
  const { db } = await start(t)
  await db.session(async (session) => {
    await add(session, 'a')
    await session.commit()
    await add(session, 'b')
    await session.rollback()
    await session.transaction().execute((trx) => trx.insertInto('notes').values({ note: 'c' }).execute())
    await session
      .transaction()
      .execute(async (trx) => {
        await trx.insertInto('notes').values({ note: 'd' }).execute()
        throw new Error('mine')
      })
      .catch(() => {})
    session.add(session.insertInto('notes').values({ note: 'e' }))
  })
  await holds(t, database, ['a', 'c', 'e'])
})

test('a COMMIT that fails rejects the session', async (t) => {
  const { db } = await start(t)
  const session = db.session(async (session) => {
    await add(session, 'x')
    await sql`insert into children values (1)`.execute(session)
  })
  await t.rejects(session, { code: '23503', statusCode: 500, retryable: false, cause: { constraint: /children/ } })
  await t.rejects(
    db.session(async (session) => {
      await add(session, 'x')
      await sql`select 1/0`.execute(session).catch(() => {})
    }),
    { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' },
  )
  await holds(t, database, [])
  t.match(db.snapshot().totals, { failedCommits: 2, commits: 0, opened: 1 })
})

test('the options of a session reach its transaction', async (t) => {
  const { db, proxy } = await start(t, { isolationLevel: 'repeatable read', pool: { size: 1 } })
  const settings = (session: Session) =>
    sql<Record<string, string>>`
      select current_setting('transaction_isolation') isolation, current_setting('transaction_read_only') ro,
        current_setting('transaction_deferrable') deferrable, current_setting('statement_timeout') timeout,
        current_setting('app.tenant', true) tenant`
      .execute(session)
      .then(({ rows }) => rows[0])
  t.match(await db.session(settings), { isolation: 'repeatable read', ro: 'off', timeout: '0' })
  const all = {
    isolationLevel: 'serializable',
    readOnly: true,
    deferrable: true,
    statementTimeoutMillis: 1234,
    settings: { 'app.tenant': 7 },
    name: 'report',
  } as const
  const inForce = { isolation: 'serializable', ro: 'on', deferrable: 'on', timeout: '1234ms', tenant: '7' }
  t.match(await db.session(all, settings), inForce)
  t.match(await db.session(settings), { isolation: 'repeatable read', ro: 'off', timeout: '0', tenant: '' })
  t.match(proxy.statements().flat(), ['BEGIN ISOLATION LEVEL REPEATABLE READ'])
  await t.rejects(
    db.session({ readOnly: true }, (session) => add(session, 'x')),
    { code: '25006' },
  )
  await holds(t, database, [])
})

test('an autocommit session sends each statement on its own', async (t) => {
  const { db, proxy } = await start(t, { pool: { size: 1 } })
  await t.rejects(
    db.session({ autocommit: true }, async (session) => {
      await add(session, 'a')
      t.equal(db.snapshot().checkedOut, 0, 'the connection is back between statements')
      await add(session, 'b')
      throw new Error('mine')
    }),
    /mine/,
  )
  t.notOk(
    proxy
      .statements()
      .flat()
      .some((text) => /BEGIN|COMMIT|ROLLBACK/.test(text)),
  )
  await holds(t, database, ['a', 'b'])
})

test('an unknown option of a session is refused', async (t) => {
  const { db } = await start(t)
  const never = async () => t.fail('the function is not called')
  await t.rejects(db.session({ readonly: true } as object, never), {
    code: 'FST_REQUEST_DB_INVALID_OPTION',
    message: /session\.readonly/,
  })
  await t.rejects(db.session({ isolationLevel: 'snapshot' as 'serializable' }, never), { message: /isolationLevel/ })
})

test('sessions wait for each other in order, and one inside another needs two connections', async (t) => {
  const { db } = await start(t, { pool: { size: 1, timeoutMillis: 500 } })
  const order = ['1', '2', '3', '4']
  await Promise.all(order.map((note) => db.session((session) => add(session, note))))
  await holds(t, database, order)
  await t.rejects(
    db.session(async (outer) => {
      await add(outer, 'outer')
      await db.session((inner) => add(inner, 'inner'))
    }),
    { code: 'FST_REQUEST_DB_POOL_TIMEOUT' },
  )
  await holds(t, database, order)
})

test('a killed connection rejects the session with CONNECTION_LOST', async (t) => {
  const { db } = await start(t)
  await t.rejects(
    db.session(async (session) => {
      const pid = await pidOf(session)
      await terminate(database, pid)
      await eventually(() => isGone(database, pid))
      await add(session, 'x')
    }),
    { code: 'FST_REQUEST_DB_CONNECTION_LOST', retryable: true },
  )
  await holds(t, database, [])
})

test('ping answers with the milliseconds it took, and leaves nothing', async (t) => {
  const { db, proxy } = await start(t)
  proxy.delay(20)
  const millis = await db.ping()
  t.type(millis, 'number')
  t.ok(millis >= 40 && millis < 2000, `${millis} ms`)
  t.strictSame(proxy.statements(), [[]], 'a bare Sync')
  t.match(db.snapshot(), { open: 1, idle: 1, checkedOut: 0 })
})

test('ping fails where there is no server, and where it is silent', async (t) => {
  const { db, proxy } = await start(t, { pool: { size: 1, prePing: { timeoutMillis: 500 } } })
  await db.ping()
  proxy.swallow()
  await t.rejects(db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE' })
  t.match(db.snapshot(), { open: 0, checkedOut: 0 })
  await db.ping()
  proxy.cut('reset')
  await proxy.refuse()
  await eventually(() => db.snapshot().open === 0)
  const error = await db.ping().catch((error) => error)
  t.match(error, { code: 'FST_REQUEST_DB_UNAVAILABLE', statusCode: 503, cause: { code: 'ECONNREFUSED' } })
  t.notMatch(error.message, /127\.0\.0\.1|postgres/)
  await proxy.accept()
  await db.ping()
})

test('ping works without prePing, and gives up on a silent server all the same', async (t) => {
  const { db, proxy } = await start(t, { pool: { size: 1, prePing: false }, settleTimeoutMillis: 500 })
  t.type(await db.ping(), 'number')
  proxy.swallow()
  await t.rejects(db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE' })
})

test('ping waits its turn in the queue, and no longer', async (t) => {
  const { db } = await start(t, { pool: { size: 1, timeoutMillis: 500 } })
  const goOn = gate()
  const holder = db.session(async (session) => {
    await add(session, 'x')
    await goOn.opened
  })
  await t.rejects(db.ping(), { code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
  const waiting = db.ping()
  await eventually(() => db.snapshot().waiting === 1)
  t.match(db.snapshot().waiters, [{ method: '', route: 'ping' }])
  goOn.open()
  await holder
  await waiting
})

test('snapshot says who holds what and who waits, as plain data', async (t) => {
  const { app, db } = await start(t, { pool: { size: 1, maxOverflow: 1 } })
  const goOn = gate()
  const holder = db.session({ name: 'nightly' }, async (session) => {
    await add(session, 'x')
    await goOn.opened
  })
  const second = db.session(async (session) => {
    await add(session, 'y')
    await goOn.opened
  })
  await eventually(() => db.snapshot().holders.filter(({ statements }) => statements === 1).length === 2)
  const third = db.session({ name: 'late' }, (session) => add(session, 'z'))
  await eventually(() => db.snapshot().waiting === 1)
  const snapshot = db.snapshot()
  t.match(snapshot, { name: 'db', size: 1, maxOverflow: 1, open: 2, idle: 0, checkedOut: 2, overflow: 1, waiting: 1 })
  // Who opened its connection first is the network's choice.
  const holders = [...snapshot.holders].sort((one, other) => one.route.localeCompare(other.route))
  t.match(holders, [
    { method: '', route: 'nightly', requestId: '', statements: 1, inTransaction: true },
    { route: 'session', lastStatement: 'insert into "notes" ("note") values ($1)' },
  ])
  t.match(snapshot.waiters, [{ route: 'late' }])
  const { heldMillis, busyMillis, idleMillis, pid } = holders[0]!
  t.ok(heldMillis > 0 && Math.abs(busyMillis + idleMillis - heldMillis) < 1)
  t.ok((await database.backends()).some((backend) => backend.pid === pid))
  t.strictSame(JSON.parse(JSON.stringify(snapshot)), snapshot, 'plain data')
  goOn.open()
  await Promise.all([holder, second, third])
  t.equal(snapshot.checkedOut, 2, 'a copy, not a view')
  await eventually(() => db.snapshot().open === 1)
  t.match(app.db.snapshot(), { checkedOut: 0, overflow: 0, waiting: 0, holders: [], waiters: [] })
})

test('kysely sends each statement on its own, on any connection', async (t) => {
  const { db, proxy } = await start(t, { pool: { size: 2 } })
  await Promise.all(['a', 'b'].map((note) => db.kysely.insertInto('notes').values({ note }).execute()))
  t.equal((await db.kysely.selectFrom('notes').selectAll().execute()).length, 2)
  t.notOk(
    proxy
      .statements()
      .flat()
      .some((text) => /BEGIN|COMMIT/.test(text)),
  )
  t.match(db.snapshot(), { checkedOut: 0, totals: { checkouts: 3, opened: 2 } })
  await t.rejects(sql`select 1/0`.execute(db.kysely), { code: '22012' })
  t.match(await sql`select 1 as n`.execute(db.kysely), { rows: [{ n: 1 }] })
})

test('kysely has transactions, streams and connections of its own', async (t) => {
  const { db } = await start(t, { pool: { size: 1 } })
  await db.kysely.transaction().execute((trx) => trx.insertInto('notes').values({ note: 'a' }).execute())
  await t.rejects(
    db.kysely.transaction().execute(async (trx) => {
      await trx.insertInto('notes').values({ note: 'b' }).execute()
      throw new Error('mine')
    }),
    /mine/,
  )
  const level = db.kysely.transaction().setIsolationLevel('serializable')
  const shown = await level.execute(async (trx) => (await sql`show transaction_isolation`.execute(trx)).rows)
  t.match(shown, [{ transaction_isolation: 'serializable' }])
  const notes: string[] = []
  for await (const { note } of db.kysely.selectFrom('notes').select('note').stream()) notes.push(note)
  t.strictSame(notes, ['a'])
  for await (const _ of db.kysely.selectFrom('notes').select('note').stream()) break
  const pids = await db.kysely.connection().execute(async (one) => {
    const ask = async () => (await sql<{ pid: number }>`select pg_backend_pid() pid`.execute(one)).rows[0]?.pid
    return [await ask(), await ask()]
  })
  t.equal(pids[0], pids[1])
  await db.kysely.destroy()
  await db.ping()
  await holds(t, database, ['a'])
})

test('a session in the background reports on the log of the app', async (t) => {
  const log = captureLog()
  await database.query('delete from notes')
  const app = await buildApp(t, database, {}, () => {}, { logger: log.options })
  await app.db.session(async (session) => {
    session.afterCommit(() => {
      throw new Error('mine')
    })
    await add(session, 'x')
  })
  await eventually(() => log.problems().length === 1)
  t.match(log.problems()[0]?.err, { message: 'mine' })
  await holds(t, database, ['x'])
})
