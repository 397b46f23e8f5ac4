import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { garblingSocket } from '../support/garbling-socket.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

t.beforeEach(() => database.query('truncate notes restart identity'))

/** A value that pg asks for its text, and that has none. */
const unmappable = {
  toPostgres() {
    throw new RangeError('no text for this value')
  },
}
const badInsert = sql`insert into notes (note) values (${unmappable})`

test('a first statement whose parameter throws opens nothing and sends nothing', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { post, app } = await oneRoute(t, database, (db) => badInsert.execute(db), {
    connectionString: proxy.connectionString,
  })
  t.match((await post()).json(), { statusCode: 500, message: 'no text for this value' })
  t.strictSame(proxy.recordings, [])
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

test('a later statement whose parameter throws sends nothing of it, and the transaction is as good as before', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await db.insertInto('notes').values({ note: 'before' }).execute()
    await t.rejects(badInsert.execute(db), { message: 'no text for this value' })
    t.equal(db.state, 'begun')
    await db.insertInto('notes').values({ note: 'after' }).execute()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^insert/], [/^insert/], ['COMMIT']])
  t.match(await database.rows('notes'), [{ note: 'before' }, { note: 'after' }])
})

test('among first statements the one whose parameter throws takes no COMMIT along', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) =>
    Promise.all([db.insertInto('notes').values({ note: 'sibling' }).execute(), badInsert.execute(db)]),
  )
  t.match((await post()).json(), { statusCode: 500, message: 'no text for this value' })
  t.notOk(proxy.statements().flat().includes('COMMIT'))
  t.strictSame(await database.rows('notes'), [])
})

test('a write whose parameter throws is refused by add itself', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => {
    db.add(db.insertInto('notes').values({ note: 'good' }))
    t.throws(() => db.add(db.insertInto('notes').values({ note: sql<string>`${unmappable}` })), {
      message: 'no text for this value',
    })
    throw new Error('mine')
  })
  t.match((await post()).json(), { statusCode: 500, message: 'mine' })
  t.strictSame(proxy.statements(), [])
  t.strictSame(await database.rows('notes'), [])
})

test('a write that cannot be compiled is refused by add itself, and what was added is kept', async (t) => {
  const { post } = await oneRoute(t, database, (db) => {
    db.add(db.insertInto('notes').values({ note: 'good' }))
    const uncompilable = {
      compile() {
        throw new TypeError('cannot be compiled')
      },
    }
    t.throws(() => db.add(uncompilable), { message: 'cannot be compiled' })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'good' }])
})

test('a stream whose parameter throws sends nothing', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    for await (const row of db
      .selectFrom('notes')
      .selectAll()
      .where('note', '=', sql<string>`${unmappable}`)
      .stream(1)) {
      t.fail('a row', row)
    }
  })
  t.match((await post()).json(), { statusCode: 500, message: 'no text for this value' })
  t.strictSame(proxy.statements(), [])
})

for (const [what, settings] of [
  [
    'throw',
    () => {
      throw new RangeError('no tenant')
    },
  ],
  ['lack a value', () => ({ 'app.tenant': undefined as unknown as string })],
] as const) {
  test(`settings that ${what} stop the first statement, and nothing is sent`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(
      t,
      database,
      (db) => db.insertInto('notes').values({ note: 'x' }).execute(),
      { settings },
    )
    const answer = await post()
    t.equal(answer.statusCode, 500)
    t.match(answer.json().message, /no tenant|settings\['app\.tenant'\].*undefined/)
    t.strictSame(proxy.statements(), [])
  })

  test(`settings that ${what} stop a request that only adds, and nothing is sent`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(
      t,
      database,
      (db) => {
        db.add(db.insertInto('notes').values({ note: 'x' }))
        return 'ok'
      },
      { settings },
    )
    const answer = await post()
    t.equal(answer.statusCode, 500)
    t.match(answer.json().message, /no tenant|settings\['app\.tenant'\].*undefined/)
    t.strictSame(proxy.statements(), [])
    t.strictSame(await database.rows('notes'), [])
  })

  test(`settings that ${what} make begin() and withClient() reject`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(
      t,
      database,
      async (db) => {
        await t.rejects(db.begin())
        t.equal(db.state, 'idle')
        await t.rejects(db.withClient(async () => t.fail('the client was handed out')))
        await t.rejects(db.transaction().execute(async () => t.fail('the callback ran')))
        return 'ok'
      },
      { settings },
    )
    t.equal((await post()).statusCode, 200)
    t.strictSame(proxy.statements(), [])
  })
}

test('settings the server refuses: the statement gets the refusal, nothing is kept, the connection is reused', async (t) => {
  let refuse = true
  const { post, proxy } = await oneRouteThroughProxy(
    t,
    database,
    (db) => db.insertInto('notes').values({ note: 'x' }).returning('note').execute(),
    { pool: { size: 1 }, settings: () => (refuse ? { no_such_parameter: '1' } : { 'app.tenant': 'acme' }) },
  )
  t.match((await post()).json(), { statusCode: 500, code: '42704' })
  await eventually(() => proxy.flights.at(-1)?.statements[0] === 'ROLLBACK')
  t.match(proxy.statements(), [['BEGIN', /set_config/, /^insert/], ['ROLLBACK']])
  t.strictSame(await database.rows('notes'), [])
  refuse = false
  t.equal((await post()).statusCode, 200)
  t.equal(proxy.sessions.length, 1)
})

test('settings the server refuses while its siblings ride along: every one of them gets the refusal', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const settled = await Promise.allSettled([1, 2, 3].map(() => sql`select 1`.execute(db)))
      for (const { status, ...rest } of settled) {
        t.equal(status, 'rejected')
        t.match(rest, { reason: { code: '42704' } })
      }
      return 'went on'
    },
    { settings: () => ({ no_such_parameter: '1' }) },
  )
  t.match((await post()).json(), { statusCode: 500 })
})

test('a BEGIN the server refuses fails its statements, and the connection is reused', async (t) => {
  const { socket, garble } = garblingSocket()
  const { post, app } = await oneRoute(
    t,
    database,
    (db) =>
      Promise.all([
        db.insertInto('notes').values({ note: 'x' }).returning('note').execute(),
        db.insertInto('notes').values({ note: 'y' }).returning('note').execute(),
      ]),
    { pool: { size: 1 }, connection: { connectionString: database.connectionString, stream: () => socket } },
  )
  await app.db.ping()
  garble()
  const answer = await post()
  t.equal(answer.statusCode, 500)
  t.match(answer.json().code, /42601|TRANSACTION_ABORTED/)
  t.strictSame(await database.rows('notes'), [])
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'x' }, { note: 'y' }])
  t.match(app.db.snapshot().totals, { opened: 1 })
})

test('a BEGIN the server refuses and the handler goes on: nothing runs outside of a transaction', async (t) => {
  const { socket, garble } = garblingSocket()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await t.rejects(db.insertInto('notes').values({ note: 'x' }).execute())
      await t.rejects(db.insertInto('notes').values({ note: 'y' }).execute())
      return 'went on'
    },
    { pool: { size: 1 }, connection: { connectionString: database.connectionString, stream: () => socket } },
  )
  await app.db.ping()
  garble()
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await database.rows('notes'), [])
})
