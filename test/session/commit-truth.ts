import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// A COMMIT that PostgreSQL refuses, and transactions that lose to others.

const database = await createDatabase(t, {
  sql: `${NOTES};
    create table owners (id int primary key);
    create table cars (owner int references owners deferrable initially deferred);
    create table doctors (id int primary key, on_call boolean);
    create table accounts (id int primary key, amount int);
    create function disk_full() returns trigger language plpgsql as
      $$ begin raise exception 'could not extend file' using errcode = '53100'; end $$;
    create table full_disk (n int);
    create constraint trigger is_full after insert on full_disk deferrable initially deferred
      for each row execute function disk_full()`,
})
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()

t.beforeEach(() =>
  database.query(`truncate notes, owners, cars, doctors, accounts, full_disk restart identity;
    insert into doctors values (1, true), (2, true); insert into accounts values (1, 0), (2, 0)`),
)

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`a deferred constraint refuses COMMIT: clean, one COMMIT sent, who waited is unharmed (${commitOn})`, async (t) => {
    const waits = gate()
    const { app, post, proxy, log } = await oneRouteThroughProxy(
      t,
      database,
      async (db) => {
        await insert(db, 'violates')
        await sql`insert into cars values (404)`.execute(db)
        await waits.opened
        return 'ok'
      },
      {
        commitOn,
        pool: { size: 1, prePing: false },
        beside: (app) => {
          app.post('/waits', async ({ db }) => {
            await insert(db, 'unharmed')
            return 'ok'
          })
        },
      },
    )
    const violates = post()
    await eventually(() => app.db.snapshot().checkedOut === 1)
    const waiting = app.inject({ method: 'POST', url: '/waits' })
    await eventually(() => app.db.snapshot().waiting === 1)
    waits.open()
    const answer = await violates
    if (commitOn === 'onSend') {
      t.match(answer.json(), { statusCode: 500, code: '23503', message: /^COMMIT failed with 23503/ })
    } else t.equal(answer.statusCode, 200)
    t.equal((await waiting).statusCode, 200)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(await database.rows('notes'), [{ note: 'unharmed' }])
    t.strictSame(await database.rows('cars'), [])
    t.equal(
      proxy
        .statements()
        .flat()
        .filter((text) => text === 'COMMIT').length,
      2,
    )
    t.equal(proxy.sessions.length, 1, 'the connection is reused')
    t.match(app.db.snapshot().totals, { failedCommits: 1, commits: 1 })
    const [reported] = log.lines.filter(({ err }) => err?.code === '23503')
    t.match(reported, { level: 50, reqId: 'req-1' })
  })

  test(`a disk that is full at COMMIT: clean, and the connection is reused (${commitOn})`, async (t) => {
    const { app, post } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'a')
        await sql`insert into full_disk values (1)`.execute(db)
        return 'ok'
      },
      { commitOn, pool: { size: 1 } },
    )
    for (const _ of [1, 2]) {
      const answer = await post()
      if (commitOn === 'onSend') t.match(answer.json(), { statusCode: 500, code: '53100' })
      else t.equal(answer.statusCode, 200)
    }
    await eventually(() => app.db.snapshot().totals.failedCommits === 2)
    t.strictSame(await database.rows('notes'), [])
    t.match(app.db.snapshot().totals, { opened: 1 })
  })
}

test("a COMMIT that fails keeps pg's error as the cause, and is not retryable unless another caused it", async (t) => {
  const errors: unknown[] = []
  const { post } = await oneRoute(
    t,
    database,
    (db) => sql`insert into cars values (404)`.execute(db).then(() => 'ok'),
    {
      beside: (app) => app.addHook('onError', async (_request, _reply, error) => void errors.push(error)),
    },
  )
  t.equal((await post()).statusCode, 500)
  t.match(errors, [
    {
      code: '23503',
      statusCode: 500,
      retryable: false,
      cause: { code: '23503', constraint: 'cars_owner_fkey', table: 'cars', severity: 'ERROR' },
    },
  ])
})

test('an error handler can answer for a COMMIT that failed', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    (db) => sql`insert into cars values (404)`.execute(db).then(() => 'ok'),
    {
      beside: (app) =>
        app.setErrorHandler((error: { code?: string }, _request, reply) => {
          reply.code(409).send({ conflict: error.code })
        }),
    },
  )
  const answer = await post()
  t.equal(answer.statusCode, 409)
  t.strictSame(answer.json(), { conflict: '23503' })
})

test('what spoke of the success that was not to be is gone from the headers', async (t) => {
  const { post } = await oneRoute(t, database, async (db, _request, reply) => {
    await sql`insert into cars values (404)`.execute(db)
    reply.code(201).headers({ location: '/cars/1', etag: '"1"', 'cache-control': 'max-age=60', 'x-mine': 'stays' })
    return { id: 1 }
  })
  const { statusCode, headers } = await post()
  t.equal(statusCode, 500)
  t.match(headers, { 'x-mine': 'stays' })
  for (const name of ['location', 'etag', 'cache-control']) t.notOk(name in headers, name)
})

/** Two doctors who each leave because the other is on call: of two such transactions at once one must fail. */
test('a serialization failure: one is kept, one is 40001 and retryable, both connections are reused', async (t) => {
  const bothRead = gate()
  let readers = 0
  const { app } = await oneRoute(t, database, () => 'unused', {
    isolationLevel: 'serializable',
    pool: { size: 2 },
    beside: (app) => {
      app.post<{ Params: { id: string } }>('/leave/:id', async ({ db, params: { id } }) => {
        const { rows } = await sql<{ n: number }>`select count(*)::int as n from doctors where on_call`.execute(db)
        if (++readers === 2) bothRead.open()
        await bothRead.opened
        if (rows[0]?.n === 2) await sql`update doctors set on_call = false where id = ${id}`.execute(db)
        return 'left'
      })
      app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
    },
  })
  const errors: unknown[] = []
  const answers = await Promise.all(['1', '2'].map((id) => app.inject({ method: 'POST', url: `/leave/${id}` })))
  t.strictSame(answers.map(({ statusCode }) => statusCode).sort(), [200, 500])
  const failed = answers.find(({ statusCode }) => statusCode === 500)
  t.match(failed?.json(), { code: '40001' })
  t.match(errors, [{ code: '40001' }])
  t.strictSame(await database.query('select count(*)::int as n from doctors where on_call'), [{ n: 1 }])
  t.match(app.db.snapshot().totals, { opened: 2 })
})

test('a serialization failure that comes with COMMIT is marked as retryable', async (t) => {
  const errors: unknown[] = []
  const { app, post } = await oneRoute(
    t,
    database,
    async (db) => {
      const { rows } = await sql<{ n: number }>`select count(*)::int as n from doctors where on_call`.execute(db)
      await sql`update doctors set on_call = false where id = 1`.execute(db)
      // Another transaction does the same with the other doctor and commits first.
      await app.db.session(async (other) => {
        await sql`select count(*)::int as n from doctors where on_call`.execute(other)
        await sql`update doctors set on_call = false where id = 2`.execute(other)
      })
      return { n: rows[0]?.n }
    },
    {
      isolationLevel: 'serializable',
      beside: (app) => app.addHook('onError', async (_request, _reply, error) => void errors.push(error)),
    },
  )
  t.match((await post()).json(), { statusCode: 500, code: '40001', message: /^COMMIT failed with 40001/ })
  t.match(errors, [{ code: '40001', retryable: true, cause: { code: '40001' } }])
  t.strictSame(await database.rows('doctors'), [
    { id: 1, on_call: true },
    { id: 2, on_call: false },
  ])
})

test('a deadlock: one is kept, one is 40P01 and clean, both connections are reused', async (t) => {
  const bothHold = gate()
  let holders = 0
  const { app } = await oneRoute(t, database, () => 'unused', {
    pool: { size: 2 },
    beside: (app) => {
      app.post<{ Params: { from: string; to: string } }>('/:from/:to', async ({ db, params: { from, to } }) => {
        await sql`update accounts set amount = amount - 1 where id = ${from}`.execute(db)
        if (++holders === 2) bothHold.open()
        await bothHold.opened
        await sql`update accounts set amount = amount + 1 where id = ${to}`.execute(db)
        return 'ok'
      })
    },
  })
  const answers = await Promise.all(['/1/2', '/2/1'].map((url) => app.inject({ method: 'POST', url })))
  t.strictSame(answers.map(({ statusCode }) => statusCode).sort(), [200, 500])
  t.match(answers.find(({ statusCode }) => statusCode === 500)?.json(), { code: '40P01' })
  const rows = await database.rows<{ amount: number }>('accounts')
  t.strictSame(rows.map(({ amount }) => amount).sort(), [-1, 1])
  t.match(app.db.snapshot().totals, { opened: 2 })
})

test('a COMMIT that stays unanswered: COMMIT_UNKNOWN within settleTimeoutMillis, the connection is gone', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'swallow')
      return 'ok'
    },
    { settleTimeoutMillis: 200 },
  )
  const since = performance.now()
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  t.ok(performance.now() - since < 1500)
  t.equal(app.db.snapshot().open, 0)
  t.match(await database.rows('notes'), [{ note: 'a' }], 'here it was kept')
})

test('a ROLLBACK that fails is logged beside the error of the handler, never instead of it', async (t) => {
  const { post, proxy, log, app } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'reset')
    throw new Error('mine')
  })
  t.match((await post()).json(), { statusCode: 500, message: 'mine' })
  await eventually(() => app.db.snapshot().open === 0)
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ level: 40, reqId: 'req-1', msg: /ROLLBACK failed/ }])
  t.strictSame(await database.rows('notes'), [])
})

test('a row that violates nothing any more at COMMIT is kept', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await sql`insert into cars values (1)`.execute(db)
    await sql`insert into owners values (1)`.execute(db)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await database.rows('cars'), [{ owner: 1 }])
})
