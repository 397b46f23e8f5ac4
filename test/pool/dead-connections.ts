import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, isGone, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const MODES = ['onSend', 'onResponse'] as const

const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }

for (const commitOn of MODES) {
  test(`${commitOn}: a backend killed between two statements, and noticed, is CONNECTION_LOST`, async (t) => {
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.post('/', async ({ db }) => {
        const pid = await pidOf(db)
        await add(db, 'lost')
        await terminate(database, pid)
        await eventually(() => app.db.snapshot().checkedOut === 0)
        t.equal(db.state, 'failed')
        await add(db, 'never')
      })
      app.get('/', ({ db }) => pidOf(db))
    })
    const before = Number((await app.inject('/')).body)
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.match(answer.json(), LOST)
    t.strictSame(await notesIn(database), [])
    t.ok(await isGone(database, before))
    t.not(Number((await app.inject('/')).body), before, 'the next request has a fresh one')
    await eventually(() => app.db.snapshot().idle === 1)
    t.match(app.db.snapshot(), { open: 1, totals: { opened: 2, invalidated: 1, replays: 0 } })
  })

  test(`${commitOn}: a backend killed under a statement that races the news is CONNECTION_LOST`, async (t) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.post('/', async ({ db }) => {
        const pid = await pidOf(db)
        await add(db, 'lost')
        const killed = terminate(database, pid)
        for (let i = 0; i < 1000; i++) await add(db, 'races')
        await killed
        t.fail('a dead connection answered')
      })
    })
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), LOST)
    t.strictSame(await notesIn(database), [])
    t.match(app.db.snapshot(), { open: 0, totals: { invalidated: 1 } })
  })

  test(`${commitOn}: a backend killed during a long statement rejects it at once`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
      app.post('/', async ({ db }) => {
        const pid = await pidOf(db)
        await add(db, 'lost')
        const killed = async () => {
          await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep(30)')))
          await terminate(database, pid)
        }
        await Promise.all([sql`select pg_sleep(30)`.execute(db), killed()])
      })
    })
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.match(answer.json(), LOST)
    t.notMatch(answer.body, /57P01|terminating|pg_sleep/, 'what pg says is not for the client')
    t.notOk(proxy.statements().flat().includes('ROLLBACK'), 'nothing is sent on a dead socket')
    t.strictSame(await notesIn(database), [])
  })

  test(`${commitOn}: what pg said of the dead connection is the cause`, async (t) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.get('/', async ({ db }) => {
        const error = await sql`select pg_terminate_backend(pg_backend_pid()), pg_sleep(5)`.execute(db).catch((e) => e)
        t.match(error, { code: LOST.code, retryable: true, cause: { code: '57P01', severity: 'FATAL' } })
        throw error
      })
    })
    t.match((await app.inject('/')).json(), LOST)
  })

  test(`${commitOn}: a handler that catches the loss and goes on keeps nothing`, async (t) => {
    const refusals: unknown[] = []
    const app = await buildApp(t, database, { commitOn, pool: { size: 2 } }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        await terminate(database, await pidOf(db))
        for (let i = 0; i < 3; i++) await add(db, 'never').catch((error) => refusals.push(error))
        await db
          .transaction()
          .execute((trx) => trx.insertInto('notes').values({ note: 'no' }).execute())
          .catch((error) => refusals.push(error))
        db.add(db.insertInto('notes').values({ note: 'neither' }))
        return 'all is well'
      })
    })
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.match(answer.json(), LOST)
    t.match(refusals, Array(4).fill({ code: LOST.code }))
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notesIn(database), [])
    t.match(app.db.snapshot().totals, { commits: 0, opened: 1 }, 'no silent new transaction')
  })

  test(`${commitOn}: after the loss rollback() makes the session usable again`, async (t) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        await terminate(database, await pidOf(db))
        await t.rejects(add(db, 'never'), { code: LOST.code })
        await db.rollback()
        t.equal(db.state, 'idle')
        await add(db, 'kept')
        return 'ok'
      })
    })
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notesIn(database), ['kept'])
  })

  test(`${commitOn}: a connection lost after a commit() by hand loses only what came later`, async (t) => {
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'committed')
        await db.commit()
        await add(db, 'lost')
        await terminate(database, await pidOf(db))
        await add(db, 'never')
      })
    })
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), LOST)
    t.strictSame(await notesIn(database), ['committed'])
  })

  for (const setting of ['idle_in_transaction_session_timeout', 'transaction_timeout']) {
    test(`${commitOn}: ${setting} while the handler is elsewhere is CONNECTION_LOST`, async (t) => {
      const options = { commitOn, settings: () => ({ [setting]: 100 }) }
      const app = await buildApp(t, database, options, (app) => {
        app.post('/', async ({ db }) => {
          const pid = await pidOf(db)
          await add(db, 'lost')
          await eventually(() => isGone(database, pid))
          await eventually(() => db.state === 'failed')
          return 'all is well'
        })
      })
      const answer = await app.inject({ method: 'POST', url: '/' })
      if (commitOn === 'onSend') t.match(answer.json(), LOST)
      t.strictSame(await notesIn(database), [])
      t.match(app.db.snapshot(), { open: 0, totals: { commits: 0, failedCommits: 1 } })
    })
  }

  test(`${commitOn}: a backend killed inside a nested transaction gets no ROLLBACK TO`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'outer')
        await db.transaction().execute(async (trx) => {
          await trx.insertInto('notes').values({ note: 'inner' }).execute()
          await terminate(database, await pidOf(db))
          await eventually(() => db.state === 'failed')
          await trx.insertInto('notes').values({ note: 'never' }).execute()
        })
      })
    })
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), LOST)
    t.strictSame(await notesIn(database), [])
    t.match(
      proxy
        .statements()
        .flat()
        .filter((text) => /^(rollback|release)/i.test(text)),
      [],
    )
    t.equal(proxy.sessions.length, 1)
  })

  test(`${commitOn}: when the connection dies and the handler throws, its own error is the answer`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        proxy.cut('reset')
        throw new Error('mine')
      })
    })
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, message: 'mine' })
    t.strictSame(await notesIn(database), [])
    await eventually(async () => (await database.backends()).length === 0)
  })

  test(`${commitOn}: a ROLLBACK that meets a reset connection leaves the first error visible`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const app = await buildApp(t, database, { commitOn, connectionString: proxy.connectionString }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        throw new Error('mine')
      })
    })
    proxy.trap({ from: 'client', type: 'P', text: 'ROLLBACK' }, 'reset')
    t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, message: 'mine' })
    t.strictSame(await notesIn(database), [])
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(app.db.snapshot(), { open: 0, totals: { rollbacks: 1, commits: 0 } })
  })
}

test('idle backends that are killed trouble nobody', async (t) => {
  const entered = gate()
  let inside = 0
  const app = await buildApp(t, database, { pool: { size: 3, prePing: false } }, (app) => {
    app.get('/all', async ({ db }) => {
      await pidOf(db)
      if (++inside === 3) entered.open()
      await entered.opened
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  await Promise.all([1, 2, 3].map(() => app.inject('/all')))
  t.match(app.db.snapshot(), { open: 3, idle: 3 })
  const killed = (await database.backends()).map(({ pid }) => pid)
  await Promise.all(killed.map((pid) => terminate(database, pid)))
  await eventually(() => app.db.snapshot().open === 0)
  const answer = await app.inject('/')
  t.equal(answer.statusCode, 200)
  t.notOk(killed.includes(Number(answer.body)))
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { invalidated: 3, opened: 4, replays: 0 } })
})

test('idle connections that the server gives up for their idleness trouble nobody', async (t) => {
  const connectionString = `${database.connectionString}?options=-c%20idle_session_timeout%3D100`
  const app = await buildApp(t, database, { connectionString, pool: { prePing: false } }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  for (let i = 0; i < 3; i++) {
    const { statusCode, body } = await app.inject('/')
    t.equal(statusCode, 200)
    await eventually(() => isGone(database, Number(body)))
    await eventually(() => app.db.snapshot().open === 0)
  }
  t.match(app.db.snapshot().totals, { opened: 3, invalidated: 3 })
})

test('a waiter behind a killed holder is served by a fresh connection', async (t) => {
  const held = gate<number>()
  const app = await buildApp(t, database, { pool: { size: 1 } }, (app) => {
    app.get('/hold', async ({ db }) => {
      held.open(await pidOf(db))
      await sql`select pg_sleep(30)`.execute(db)
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  const holder = app.inject('/hold')
  const pid = await held.opened
  const waiters = [app.inject('/'), app.inject('/')]
  await eventually(() => app.db.snapshot().waiting === 2)
  await terminate(database, pid)
  t.match((await holder).json(), LOST)
  for (const waiter of waiters) t.equal((await waiter).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, idle: 1, waiting: 0, totals: { timeouts: 0, opened: 2 } })
})

test('a session of which many statements are under way rejects each of them once', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    app.get('/', async ({ db }) => {
      const pid = await pidOf(db)
      const all = Array.from({ length: 20 }, () => sql`select pg_sleep(30)`.execute(db))
      const settled = Promise.allSettled(all)
      await terminate(database, pid)
      return (await settled).map((one) => one.status === 'rejected' && one.reason.code)
    })
  })
  // The handler caught it, so the commit is refused too.
  t.match((await app.inject('/')).json(), LOST)
  t.match(app.db.snapshot(), { open: 0, totals: { failedCommits: 1 } })
})

test('the loss of one connection by an administrator leaves the others alone', async (t) => {
  const both = gate<number>()
  const app = await buildApp(t, database, { pool: { size: 2 } }, (app) => {
    app.get('/victim', async ({ db }) => {
      both.open(await pidOf(db))
      await sql`select pg_sleep(30)`.execute(db)
    })
    app.post('/', async ({ db }) => {
      const mine = await pidOf(db)
      await terminate(database, await both.opened)
      await add(db, 'kept')
      return mine
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  const [victim, other] = await Promise.all([app.inject('/victim'), app.inject({ method: 'POST', url: '/' })])
  t.match(victim.json(), LOST)
  t.equal(other.statusCode, 200)
  t.equal((await app.inject('/')).body, other.body, 'it is used again')
  t.strictSame(await notesIn(database), ['kept'])
})

test('a socket that breaks without a word takes all connections along that are as old', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const three = gate()
  let inside = 0
  const options = { connectionString: proxy.connectionString, pool: { size: 3, prePing: false as const } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/all', async ({ db }) => {
      await pidOf(db)
      if (++inside === 3) three.open()
      await three.opened
    })
    app.get('/cut', async ({ db }) => {
      const mine = await pidOf(db)
      proxy.cut('reset', ({ pid }) => pid === mine)
      await pidOf(db)
    })
  })
  await Promise.all([1, 2, 3].map(() => app.inject('/all')))
  t.match(app.db.snapshot(), { open: 3, idle: 3 })
  t.match((await app.inject('/cut')).json(), LOST)
  t.match(app.db.snapshot(), { open: 0, idle: 0, totals: { invalidated: 3 } })
  await eventually(async () => (await database.backends()).length === 0)
})
