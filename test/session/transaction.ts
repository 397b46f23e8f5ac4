import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// The unit of work at large; each of its parts has scenarios of its own beside this file.

const database = await createDatabase(t, {
  sql: `${NOTES}; alter table notes add constraint notes_once unique (note) deferrable initially deferred`,
})
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const add = (db: Session, note: string) => db.add(db.insertInto('notes').values({ note }))
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const CONFLICT = { code: 'FST_REQUEST_DB_NESTED_CONFLICT' }

t.beforeEach(() => database.query('truncate notes restart identity'))

test('statements, streams, writes that are added and the raw client are one transaction', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a')
    await insert(db, 'b')
    const streamed: string[] = []
    for await (const { note } of db.selectFrom('notes').select('note').orderBy('id').stream(1)) streamed.push(note)
    for await (const _ of db.selectFrom('notes').selectAll().stream(1)) break
    await db.withClient((client) => client.query("insert into notes (note) values ('c')"))
    add(db, 'd')
    await db.flush()
    await db.flush()
    add(db, 'e')
    return streamed
  })
  t.strictSame((await post()).json(), ['a', 'b'])
  t.strictSame(await notes(), ['a', 'b', 'c', 'd', 'e'])
})

test('begin, commit and rollback by hand', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.begin()
    await t.rejects(db.begin(), CONFLICT)
    await insert(db, 'a')
    await db.commit()
    await insert(db, 'b')
    await db.rollback()
    await db.transaction().execute(() => t.rejects(db.commit(), CONFLICT))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a'])
})

test('savepoints: released, rolled back, refused', async (t) => {
  const called: string[] = []
  const { post } = await oneRoute(t, database, async (db) => {
    await db.transaction().execute(async () => {
      db.afterCommit(() => called.push('kept'))
      await insert(db, 'a')
    })
    await t.rejects(
      db.transaction().execute(async () => {
        db.afterCommit(() => called.push('dropped'))
        await sql`select 1 / 0`.execute(db)
      }),
      { code: '22012' },
    )
    await t.rejects(sql`select 1 / 0`.execute(db))
    await t.rejects(
      db.transaction().execute(async () => {}),
      { code: '25P02' },
    )
    await db.rollback()
    await t.rejects(
      db.transaction().execute(async () => {
        db.add({ compile: () => sql`select 1 / 0`.compile(db) })
      }),
      { code: '22012' },
    )
    await insert(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['b'])
  t.strictSame(called, [])
})

for (const [what, spoil, code] of [
  [
    'a statement that failed and was swallowed',
    (db: Session) => sql`select 1 / 0`.execute(db).catch(() => {}),
    /TRANSACTION_ABORTED/,
  ],
  ['a constraint that COMMIT checks', (db: Session) => insert(db, 'a'), /23505/],
  ['a raw commit', (db: Session) => sql`commit`.execute(db), /TRANSACTION_ABORTED/],
  ['a raw rollback', (db: Session) => sql`rollback`.execute(db), /TRANSACTION_ABORTED/],
  [
    'a write that was added and fails',
    async (db: Session) => db.add(db.insertInto('notes').values({ note: sql<string>`(1 / 0)::text` })),
    /22012/,
  ],
  ['a handle left open', (db: Session) => db.startTransaction().execute(), /NESTED_CONFLICT/],
  [
    'a commit() that fails and nobody awaits',
    async (db: Session) => {
      await insert(db, 'a')
      db.commit().catch(() => {})
    },
    /23505/,
  ],
] as const) {
  test(`${what} is an error, never a 200 with nothing kept`, async (t) => {
    const { post, app } = await oneRoute(t, database, async (db) => {
      await insert(db, 'a')
      await spoil(db)
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code })
    t.equal(app.db.snapshot().totals.failedCommits, what.includes('handle') ? 0 : 1)
  })
}

test('a read-only session answers before its COMMIT is answered, unless something was amiss', async (t) => {
  const options = { readOnly: true, pool: { size: 1 } }
  const fine = await oneRoute(t, database, (db) => sql`select 1 as one`.execute(db), options)
  t.match((await fine.post()).json(), { rows: [{ one: 1 }] })
  const amiss = await oneRoute(
    t,
    database,
    async (db) => {
      await sql`select 1 / 0`.execute(db).catch(() => {})
      return 'went on'
    },
    options,
  )
  t.match((await amiss.post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
})

test('a COMMIT of a read-only session that fails is logged: its answer has left', async (t) => {
  const { post, proxy, log } = await oneRouteThroughProxy(t, database, (db) => sql`select 1 as one`.execute(db), {
    readOnly: true,
  })
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
  t.match((await post()).json(), { rows: [{ one: 1 }] })
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ level: 50, reqId: 'req-1', msg: /COMMIT of a read-only session/ }])
})

test('a ROLLBACK that fails is logged, and its connection dropped', async (t) => {
  const { post, proxy, log, app } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'reset')
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ level: 40, msg: /ROLLBACK failed/ }])
  await eventually(() => app.db.snapshot().open === 0)
})

test('a rollback to a savepoint that fails is logged beside the error that led there', async (t) => {
  const { post, proxy, log } = await oneRouteThroughProxy(t, database, async (db) => {
    await t.rejects(
      db.transaction().execute(async () => {
        proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK TO' }, 'reset')
        throw new Error('inner')
      }),
      { message: 'inner' },
    )
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503 })
  t.match(log.problems()[0], { level: 50, msg: /rolling back to a savepoint failed/ })
})

test('callbacks that throw are logged', async (t) => {
  const { post, log } = await oneRoute(t, database, async (db) => {
    db.afterCommit(() => {
      throw new Error('callback')
    })
    await insert(db, 'a')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ err: { message: 'callback' } }])
})

test('an autocommit session: no begin(), transactions on connections of their own, the rest waited for', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await t.rejects(db.begin(), CONFLICT)
      await db.transaction().execute(() => insert(db, 'a'))
      await db.withClient((client) => client.query("insert into notes (note) values ('b')"))
      await db.rollback()
      add(db, 'c')
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b', 'c'])
  t.equal(app.db.snapshot().checkedOut, 0)
})

for (const autocommit of [false, true]) {
  test(`an end from outside while something is open (${autocommit ? 'autocommit' : 'transaction'})`, async (t) => {
    const inside = gate()
    const ended = gate<unknown>()
    const { app } = await oneRoute(
      t,
      database,
      async (db) => {
        await db
          .transaction()
          .execute(async () => {
            await insert(db, 'a')
            inside.open()
            await sql`select pg_sleep(30)`.execute(db)
          })
          .then(ended.open, ended.open)
      },
      { route: { autocommit } },
    )
    const controller = new AbortController()
    app.inject({ method: 'POST', url: '/', signal: controller.signal }).catch(() => {})
    await inside.opened
    controller.abort()
    t.ok((await ended.opened) instanceof Error)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notes(), [])
  })
}

test('a raw client nobody awaited is taken away with its connection', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    const inside = gate()
    db.withClient(async () => {
      inside.open()
      await new Promise(() => {})
    }).catch(() => {})
    await inside.opened
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, ...CONFLICT })
  await eventually(() => app.db.snapshot().open === 0)
})

test('after the end every use is refused', async (t) => {
  let kept: Session | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    kept = db
    await insert(db, 'a')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  await t.rejects(insert(kept!, 'b'), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  t.throws(() => kept!.afterCommit(() => {}), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  t.throws(() => add(kept!, 'b'), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
})

test('everything from outside waits its turn while a nested transaction is open', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const opened = gate()
    const goOn = gate()
    const nested = db.transaction().execute(async () => {
      opened.open()
      await goOn.opened
      await insert(db, 'inside')
      throw new Error('inner')
    })
    nested.catch(() => {})
    await opened.opened
    const flights = proxy.flights.length
    const outside = [
      insert(db, 'a'),
      db.selectFrom('notes').selectAll().stream(1).next(),
      db.flush(),
      t.rejects(db.begin(), CONFLICT),
      db.transaction().execute(() => insert(db, 'b')),
      db.withClient((client) => client.query("insert into notes (note) values ('c')")),
    ]
    await database.query('select 1')
    t.equal(proxy.flights.length, flights)
    goOn.open()
    await Promise.all(outside)
    await db.commit()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['a', 'b', 'c'])
})

test('a session that is cut for its age, and its states until then', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      t.strictSame([db.state, db.inTransaction], ['idle', false])
      await db.begin()
      t.strictSame([db.state, db.inTransaction], ['begun', true])
      await t.rejects(sql`select 1 / 0`.execute(db))
      t.equal(db.state, 'failed')
      await eventually(() => db.state === 'ended')
      return 'went on'
    },
    { maxSessionMillis: 100 },
  )
  t.ok((await post()).statusCode >= 500)
})

test('flush tells what failed, withClient is not called then', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const bad = () => db.add(db.insertInto('notes').values({ note: sql<string>`(1 / 0)::text` }))
    add(db, 'a')
    bad()
    await t.rejects(db.flush(), { code: '22012' })
    await db.rollback()
    bad()
    await t.rejects(
      db.withClient(async () => t.fail('called')),
      { code: '22012' },
    )
    await db.rollback()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), [])
})

test('flush in an autocommit session tells it once', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      db.add(db.insertInto('notes').values({ note: sql<string>`(1 / 0)::text` }))
      add(db, 'a')
      await t.rejects(db.flush(), { code: '22012' })
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a'])
})

test('a wait of no time at all is none for a turn: pool.timeoutMillis 0', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await Promise.all([1, 2, 3].map((n) => db.transaction().execute(() => insert(db, `${n}`))))
      return 'ok'
    },
    { pool: { timeoutMillis: 0 } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['1', '2', '3'])
})
