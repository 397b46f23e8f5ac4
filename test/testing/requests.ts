import Fastify, { type FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import requestDb, { type RequestDbOptions, type Session } from '../../lib/index.ts'
import { beginTest } from '../../lib/testing.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { MODES } from '../support/modes.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* All sessions of an app in one transaction, which is rolled back: nothing of it is ever seen by others. */

const database = await createDatabase(t, {
  sql: `${NOTES};
    create table parents (id int primary key);
    create table children (parent int references parents deferrable initially deferred)`,
})

async function started(t: Test, routes: (app: FastifyInstance) => unknown, options: RequestDbOptions = {}) {
  const app = Fastify()
  t.teardown(() => app.close())
  const { connectionString } = database
  await app.register(requestDb, { connectionString, capacityCheck: false, ...options })
  app.post<{ Body: { note: string } }>('/notes', async ({ db, body }, reply) => {
    await add(db, body.note)
    reply.code(201)
    return { note: body.note }
  })
  app.get('/notes', async ({ db }) => notes(db))
  routes(app)
  const transaction = await beginTest(app)
  t.teardown(() => transaction.rollback())
  return { app, transaction }
}

const notes = async (db: Session) =>
  (await db.selectFrom('notes').select('note').orderBy('id').execute()).map(({ note }) => note)
const post = (app: FastifyInstance, url: string, payload?: object) =>
  app.inject({ method: 'POST', url, ...(payload && { payload }) })
const read = async (app: FastifyInstance) => (await app.inject('/notes')).json()

/** Undone, and never seen from outside. */
async function ends(t: Test, { app, transaction }: Awaited<ReturnType<typeof started>>): Promise<void> {
  t.strictSame(await notesIn(database), [], 'nobody else sees anything')
  await transaction.assertNothingLeft()
  await transaction.rollback()
  t.strictSame(await read(app), [], 'and after the rollback there is nothing')
  t.ok((await database.backends()).every(({ state }) => state === 'idle'))
}

for (const commitOn of MODES) {
  test(`what one request commits the next one reads, and what one rolls back is gone (${commitOn})`, async (t) => {
    const stage = await started(
      t,
      (app) => {
        app.post('/failed', async ({ db }) => {
          await add(db, 'lost')
          throw new Error('no')
        })
        app.post('/refused', async ({ db }, reply) => {
          await add(db, 'lost too')
          return reply.code(409).send()
        })
        app.post('/deferred', async ({ db }) => {
          db.add(db.insertInto('notes').values({ note: 'deferred' }))
          return 'ok'
        })
      },
      { commitOn },
    )
    const { app } = stage
    t.equal((await post(app, '/notes', { note: 'one' })).statusCode, 201)
    t.equal((await post(app, '/failed')).statusCode, 500)
    t.equal((await post(app, '/refused')).statusCode, 409)
    t.equal((await post(app, '/deferred')).statusCode, 200)
    t.equal((await post(app, '/notes', { note: 'two' })).statusCode, 201)
    t.strictSame(await read(app), ['one', 'deferred', 'two'])
    await ends(t, stage)
  })
}

test('commit() and rollback() by hand, nested transactions, a statement that fails', async (t) => {
  const stage = await started(t, (app) => {
    app.post('/by-hand', async ({ db }) => {
      await add(db, 'committed')
      await db.commit()
      await add(db, 'rolled back')
      await db.rollback()
      await db.transaction().execute((trx) => add(trx, 'nested'))
      await db
        .transaction()
        .execute(async (trx) => {
          await add(trx, 'not kept')
          await sql`select 1 / 0`.execute(trx)
        })
        .catch(() => {})
      return 'ok'
    })
    app.post('/broken', async ({ db }) => {
      await add(db, 'lost')
      await sql`select 1 / 0`.execute(db)
    })
    app.post('/swallowed', async ({ db }) => {
      await add(db, 'lost')
      await sql`select 1 / 0`.execute(db).catch(() => {})
      return 'ok'
    })
    app.post('/raw-commit', async ({ db }) => {
      await add(db, 'lost')
      await sql`commit`.execute(db)
      return 'ok'
    })
  })
  const { app } = stage
  t.equal((await post(app, '/by-hand')).statusCode, 200)
  t.equal((await post(app, '/broken')).json().code, '22012')
  t.equal((await post(app, '/swallowed')).json().code, 'FST_REQUEST_DB_TRANSACTION_ABORTED')
  t.equal((await post(app, '/raw-commit')).json().code, '0A000')
  t.strictSame(await read(app), ['committed', 'nested'])
  await ends(t, stage)
})

test('sessions outside of requests, single statements, streams, the raw client', async (t) => {
  const stage = await started(t, (app) => {
    app.post('/copy', async ({ db }) => {
      await db.withClient((client) => client.query("insert into notes (note) values ('raw')"))
      return 'ok'
    })
    app.get('/stream', async ({ db }) => {
      const seen: string[] = []
      for await (const { note } of db.selectFrom('notes').select('note').orderBy('id').stream(1)) seen.push(note)
      return seen
    })
    app.get('/autocommit', { config: { db: { autocommit: true } } }, async ({ db }) => {
      await add(db, 'autocommit')
      await sql`select 1 / 0`.execute(db).catch(() => {})
      await db.transaction().execute((trx) => add(trx, 'in a transaction'))
      return 'ok'
    })
  })
  const { app } = stage
  await app.db.session((db) => add(db, 'session'))
  await app.db.kysely.insertInto('notes').values({ note: 'statement' }).execute()
  await t.rejects(sql`select 1 / 0`.execute(app.db.kysely), { code: '22012' })
  await app.db.kysely.transaction().execute((trx) => add(trx, 'transaction'))
  await t.rejects(
    app.db.session(async (db) => {
      await add(db, 'lost')
      throw new Error('no')
    }),
    { message: 'no' },
  )
  t.equal((await post(app, '/copy')).statusCode, 200)
  t.equal((await app.inject('/autocommit')).statusCode, 200)
  const all = ['session', 'statement', 'transaction', 'raw', 'autocommit', 'in a transaction']
  t.strictSame((await app.inject('/stream')).json(), all)
  t.type(await app.db.ping(), 'number')
  await ends(t, stage)
})

test('requests side by side take turns', async (t) => {
  const stage = await started(t, () => {})
  const { app } = stage
  const answers = await Promise.all(Array.from({ length: 12 }, (_, n) => post(app, '/notes', { note: `${n}` })))
  t.ok(answers.every(({ statusCode }) => statusCode === 201))
  t.equal((await read(app)).length, 12)
  t.equal(app.db.snapshot().totals.opened, 1)
  await ends(t, stage)
})

test('a session inside one that has the connection is refused at once, naming the route', async (t) => {
  const stage = await started(t, (app) => {
    app.post('/inside', async ({ db }) => {
      await add(db, 'lost')
      await app.db.session((inner) => add(inner, 'never'))
    })
    app.post('/injected', async ({ db }) => {
      await add(db, 'lost')
      return (await post(app, '/notes', { note: 'never' })).json()
    })
    app.post('/after', async ({ db }) => {
      await add(db, 'first')
      await db.commit()
      await app.db.session((inner) => add(inner, 'second'))
      return 'ok'
    })
  })
  const { app } = stage
  const { code, message } = (await post(app, '/inside')).json()
  t.equal(code, 'FST_REQUEST_DB_NESTED_CONFLICT')
  t.match(message, /^POST \/inside opens a session while its own has the only connection .*commit\(\) first/)
  t.match((await post(app, '/injected')).json(), {
    code: 'FST_REQUEST_DB_NESTED_CONFLICT',
    message: /^POST \/injected/,
  })
  t.equal((await post(app, '/after')).statusCode, 200)
  t.equal((await read(app)).includes('second'), true)
  await stage.transaction.rollback()
})

test('a read-only route still refuses writes, and the next route may write', async (t) => {
  const stage = await started(t, (app) => {
    const config = { db: { readOnly: true } }
    app.post('/read-only', { config }, async ({ db }) => add(db, 'never'))
    app.get('/look', { config }, async ({ db }) => notes(db))
    app.get('/autocommit', { config: { db: { readOnly: true, autocommit: true } } }, async ({ db }) => add(db, 'never'))
  })
  const { app } = stage
  t.equal((await post(app, '/read-only')).json().code, '25006')
  t.equal((await post(app, '/notes', { note: 'one' })).statusCode, 201)
  t.strictSame((await app.inject('/look')).json(), ['one'])
  t.equal((await app.inject('/autocommit')).json().code, '25006')
  t.equal((await post(app, '/notes', { note: 'two' })).statusCode, 201)
  await ends(t, stage)
})

test('settings and timeouts are those of their request', async (t) => {
  const stage = await started(
    t,
    (app) => {
      const settings = sql<{ tenant: string; timeout: string }>`select
        current_setting('app.tenant', true) as tenant, current_setting('statement_timeout') as timeout`
      app.get('/settings', async ({ db }) => (await settings.execute(db)).rows[0])
      app.get(
        '/timeout',
        { config: { db: { statementTimeoutMillis: 77_000 } } },
        async ({ db }) => (await settings.execute(db)).rows[0],
      )
      app.post('/kept', async ({ db }) => {
        db.add(db.insertInto('notes').values({ note: 'x' }))
        return 'ok'
      })
    },
    { settings: ({ headers }) => (headers['x-tenant'] ? { 'app.tenant': String(headers['x-tenant']) } : {}) },
  )
  const { app } = stage
  const get = async (url: string, tenant?: string) =>
    (await app.inject({ url, headers: tenant === undefined ? {} : { 'x-tenant': tenant } })).json()
  t.strictSame(await get('/settings', 'a'), { tenant: 'a', timeout: '0' })
  t.strictSame(await get('/settings', 'b'), { tenant: 'b', timeout: '0' })
  t.strictSame(await get('/settings'), { tenant: '', timeout: '0' })
  t.strictSame(await get('/timeout', 'c'), { tenant: 'c', timeout: '77s' })
  t.strictSame(await get('/settings'), { tenant: '', timeout: '0' })
  await app.inject({ method: 'POST', url: '/kept', headers: { 'x-tenant': 'd' } })
  t.strictSame(await get('/settings'), { tenant: '', timeout: '0' })
  await ends(t, stage)
})

test('deferred constraints are looked at when a request commits, and the one after it has them deferred again', async (t) => {
  const stage = await started(t, (app) => {
    app.post('/orphan', async ({ db }) => {
      await sql`insert into children values (1)`.execute(db)
      return 'ok'
    })
    app.post('/family', async ({ db }) => {
      await sql`insert into children values (2)`.execute(db)
      await sql`insert into parents values (2)`.execute(db)
      return 'ok'
    })
  })
  const { app } = stage
  t.match((await post(app, '/orphan')).json(), { statusCode: 500, code: '23503' })
  t.equal((await post(app, '/family')).statusCode, 200)
  t.match((await post(app, '/orphan')).json(), { statusCode: 500, code: '23503' })
  const { rows } = await sql<{ parent: number }>`select parent from children`.execute(app.db.kysely)
  t.strictSame(rows, [{ parent: 2 }])
  await ends(t, stage)
})

test('callbacks of afterCommit are captured with their route, and run when the test says so', async (t) => {
  const calls: string[] = []
  const stage = await started(t, (app) => {
    app.post('/mail', async ({ db }) => {
      await add(db, 'x')
      db.afterCommit(() => calls.push('mail'))
      return 'ok'
    })
    app.post('/failed', async ({ db }) => {
      db.afterCommit(() => calls.push('never'))
      db.afterRollback(() => calls.push('rolled back'))
      await add(db, 'x')
      throw new Error('no')
    })
  })
  const { app, transaction } = stage
  await post(app, '/mail')
  await post(app, '/failed')
  await transaction.assertNothingLeft()
  t.strictSame(calls, ['rolled back'])
  t.match(transaction.callbacks, [{ method: 'POST', route: '/mail' }])
  await transaction.runCallbacks()
  t.strictSame(calls, ['rolled back', 'mail'])
  t.strictSame(transaction.callbacks, [])
  await ends(t, stage)
})

test('a client that leaves in the middle of a statement takes nothing of the others along', async (t) => {
  const sleeping = gate()
  const stage = await started(t, (app) => {
    app.post('/slow', async ({ db }) => {
      await add(db, 'lost')
      const slow = sql`select pg_sleep(60)`.execute(db)
      sleeping.open()
      await slow
    })
  })
  const { app, transaction } = stage
  await post(app, '/notes', { note: 'kept' })
  const client = await openHttp(t, app)
  client.send('POST', '/slow', { body: {} })
  await sleeping.opened
  client.destroy()
  await transaction.assertNothingLeft(20_000)
  t.strictSame(await read(app), ['kept'])
  await ends(t, stage)
})

test('retries are made inside the transaction', async (t) => {
  let runs = 0
  const stage = await started(t, (app) => {
    app.post('/again', { config: { db: { retry: {} } } }, async ({ db }) => {
      await add(db, `run ${++runs}`)
      if (runs === 1) throw Object.assign(new Error('again'), { code: '40001' })
      return 'ok'
    })
  })
  t.equal((await post(stage.app, '/again')).statusCode, 200)
  t.strictSame(await read(stage.app), ['run 2'])
  await ends(t, stage)
})

test('test after test on one app; two at once are refused; the app has its own pool in between', async (t) => {
  const { app, transaction } = await started(t, () => {})
  await t.rejects(beginTest(app), { code: 'FST_REQUEST_DB_INVALID_OPTION' })
  await t.rejects(beginTest(app, { decorator: 'other' }), { code: 'FST_REQUEST_DB_INVALID_OPTION' })
  await transaction.rollback()
  for (const note of ['a', 'b']) {
    const transaction = await beginTest(app, { isolationLevel: 'repeatable read' })
    await post(app, '/notes', { note })
    t.strictSame(await read(app), [note])
    await transaction.rollback()
    await transaction.rollback()
  }
  t.strictSame(await read(app), [])
})

test('when the connection dies, the test is told, and nothing is begun anew behind its back', async (t) => {
  const { app, transaction } = await started(t, (app) => {
    app.get('/pid', async ({ db }) => pidOf(db))
  })
  await post(app, '/notes', { note: 'gone' })
  await database.query('select pg_terminate_backend($1, 5000)', [(await app.inject('/pid')).json()])
  const answer = await app.inject('/notes')
  t.equal(answer.statusCode, 503)
  const error = await app.db.session((db) => notes(db)).catch((error: Error) => error)
  t.match((error as Error).cause, { message: /transaction of the test was lost/ })
  await transaction.rollback()
  t.strictSame(await read(app), [])
})

test('an app that is closed in the middle of a test closes everything', async (t) => {
  const { app, transaction } = await started(t, () => {})
  await post(app, '/notes', { note: 'x' })
  await app.close()
  t.strictSame(await database.backends(), [])
  await transaction.rollback()
  t.strictSame(await notesIn(database), [])
})
