import { CompiledQuery, sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: `${NOTES}; create unique index notes_once on notes (note)` })
const add = (db: Session, ...notes: string[]) => {
  for (const note of notes) db.add(db.insertInto('notes').values({ note }))
}
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('what was added leaves with the next statement, in its flight, before it and in order', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    add(db, 'a', 'b')
    const seen = await db.selectFrom('notes').select('note').orderBy('id').execute()
    add(db, 'c')
    return seen
  })
  t.strictSame((await post()).json(), [{ note: 'a' }, { note: 'b' }])
  t.match(proxy.statements(), [
    ['BEGIN', /^insert/, /^insert/, /^select/],
    [/^insert/, 'COMMIT'],
  ])
  t.equal(proxy.roundTrips(), 2)
  t.strictSame(await notes(), ['a', 'b', 'c'])
})

test('flush sends what was added, and a second flush nothing', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    add(db, 'a', 'b')
    t.equal(await db.flush(), undefined)
    await db.flush()
    t.equal(proxy.flights.length, 1)
    t.equal(db.inTransaction, true)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^insert/, /^insert/], ['COMMIT']])
  t.strictSame(await notes(), ['a', 'b'])
})

test('commit() by hand takes what was added along, and the session begins anew with the next', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    add(db, 'a')
    await db.commit()
    t.strictSame(await notes(), ['a'])
    add(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [
    ['BEGIN', /^insert/, 'COMMIT'],
    ['BEGIN', /^insert/, 'COMMIT'],
  ])
  t.strictSame(await notes(), ['a', 'b'])
})

test('rollback() by hand drops what was added', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    add(db, 'a')
    await db.rollback()
    add(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^insert/, 'COMMIT']])
  t.strictSame(await notes(), ['b'])
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`what was added by a request that fails is never sent (${commitOn})`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(
      t,
      database,
      (db) => {
        add(db, 'a')
        throw new Error('mine')
      },
      { commitOn },
    )
    t.match((await post()).json(), { statusCode: 500, message: 'mine' })
    t.strictSame(proxy.statements(), [])
  })

  test(`what was added by a request that answers 400 is never sent (${commitOn})`, async (t) => {
    const handler = (db: Session, _: unknown, reply: { code(status: number): unknown }) => {
      add(db, 'a')
      reply.code(400)
      return 'no'
    }
    const { post, proxy } = await oneRouteThroughProxy(t, database, handler, { commitOn })
    t.equal((await post()).statusCode, 400)
    t.strictSame(proxy.statements(), [])
  })
}

test('a write that fails at the commit is named by its number, with the code and the error of PostgreSQL', async (t) => {
  const errors: unknown[] = []
  const { post, app } = await oneRoute(
    t,
    database,
    (db) => {
      add(db, 'a', 'a', 'c')
      return 'ok'
    },
    {
      pool: { size: 1 },
      beside: (app) => app.addHook('onError', async (_request, _reply, error) => void errors.push(error)),
    },
  )
  const answer = await post()
  t.match(answer.json(), { statusCode: 500, code: '23505', message: /^Deferred write 2 failed with 23505/ })
  t.match(errors, [{ retryable: false, cause: { code: '23505', constraint: 'notes_once', severity: 'ERROR' } }])
  t.strictSame(await notes(), [])
  t.equal((await post()).statusCode, 500)
  t.match(app.db.snapshot().totals, { opened: 1, failedCommits: 2 })
})

test('a write that fails at the commit after the answer has left is logged', async (t) => {
  const { post, log } = await oneRoute(
    t,
    database,
    (db) => {
      add(db, 'a', 'a')
      return 'ok'
    },
    { commitOn: 'onResponse' },
  )
  t.equal((await post()).statusCode, 200)
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ level: 50, reqId: 'req-1', err: { code: '23505' } }])
  t.strictSame(await notes(), [])
})

test('what was added is kept after the answer has left, though a connection must first be opened or waited for', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    (db, { id }) => {
      add(db, id)
      return 'ok'
    },
    { commitOn: 'onResponse', pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  await eventually(() => app.db.snapshot().totals.commits === 1)
  const goOn = gate()
  const holder = app.db.session(async (db) => {
    await db.begin()
    await goOn.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.equal((await post()).statusCode, 200)
  await eventually(() => app.db.snapshot().waiting === 1)
  goOn.open()
  await holder
  await eventually(async () => (await notes()).length === 2)
  t.strictSame(await notes(), ['req-1', 'req-2'])
})

test('flush rejects with what PostgreSQL said of the first write it refused', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a', 'a', 'c')
    const error = await db.flush().catch((error: unknown) => error)
    t.match(error, { code: '23505', constraint: 'notes_once', severity: 'ERROR' })
    t.equal(db.state, 'failed')
    return 'went on'
  })
  const answer = await post()
  t.equal(answer.statusCode, 500)
  t.strictSame(await notes(), [])
})

test('after a flush that failed and a rollback() the session is as new', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a', 'a')
    await t.rejects(db.flush(), { code: '23505' })
    await db.rollback()
    t.equal(db.state, 'idle')
    add(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['b'])
})

test('a statement behind a write that failed is skipped, and the answer names the write although both were swallowed', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a', 'a')
    await t.rejects(db.selectFrom('notes').selectAll().execute(), {
      code: 'FST_REQUEST_DB_TRANSACTION_ABORTED',
      cause: { code: '23505' },
    })
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 500, code: '23505', message: /Deferred write 2/ })
  t.strictSame(await notes(), [])
})

test('begin() takes what was added along', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a')
    await db.begin()
    t.equal(db.inTransaction, true)
    return db.selectFrom('notes').select('note').execute()
  })
  t.strictSame((await post()).json(), [{ note: 'a' }])
  t.strictSame(await notes(), ['a'])
})

test('each transaction counts its writes from one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a', 'b')
    await db.commit()
    add(db, 'c', 'c')
    return 'ok'
  })
  t.match((await post()).json(), { message: /^Deferred write 2 failed/ })
  t.strictSame(await notes(), ['a', 'b'])
})

test('what a value was at the time of add is what is written', async (t) => {
  await database.query('create table documents (body jsonb)')
  const { post } = await oneRoute(t, database, (db) => {
    const documents = db.withTables<{ documents: { body: unknown } }>()
    const body = { version: 1 }
    db.add(documents.insertInto('documents').values({ body }))
    body.version = 2
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await database.rows('documents'), [{ body: { version: 1 } }])
})

test('anything that compiles can be added, and what it returns is dropped', async (t) => {
  const { post } = await oneRoute(t, database, (db) => {
    db.add({ compile: () => CompiledQuery.raw('insert into notes (note) values ($1)', ['raw']) })
    db.add(db.insertInto('notes').values({ note: 'returning' }).returningAll())
    db.add(db.selectFrom('notes').selectAll())
    db.add(db.updateTable('notes').set({ note: sql<string>`note || '!'` }).where('note', '=', 'raw'))
    db.add(db.deleteFrom('notes').where('note', '=', 'returning'))
    db.add(db.schema.createTable('made_by_add').addColumn('id', 'integer'))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['raw!'])
  t.strictSame(await database.rows('made_by_add'), [])
})

test('two thousand writes are one flight', async (t) => {
  const padding = 'x'.repeat(500)
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => {
    add(db, ...Array.from({ length: 2000 }, (_, n) => `${n} ${padding}`))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal(proxy.flights.length, 1)
  t.equal((await notes()).length, 2000)
})

test('a flush nobody awaits comes before the commit', async (t) => {
  const { post } = await oneRoute(t, database, (db) => {
    add(db, 'a')
    void db.flush()
    add(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b'])
})

test('a read-only session refuses what was added', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    (db) => {
      add(db, 'a')
      return 'ok'
    },
    { readOnly: true },
  )
  t.match((await post()).json(), { statusCode: 500, code: '25006' })
})

test('add and flush after the end are refused', async (t) => {
  let kept: Session | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    kept = db
    await insert(db, 'a')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.throws(() => add(kept as Session, 'late'), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  await t.rejects((kept as Session).flush(), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
})

test('what was added on a session whose connection has died is refused, not kept for a new one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
    add(db, 'a')
    await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
})
