import { getEventListeners } from 'node:events'
import { sql } from 'kysely'
import type { Session, SessionOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* fastify.db.session(options, fn): jobs that are aborted, have a deadline, and are tried again. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const raise = (state: string) => sql.raw(`do $$ begin raise exception 'raised' using errcode = '${state}'; end $$`)
const sleep = sql`select pg_sleep(60)`

const isRunning = async (query: string) => (await database.backends()).some((backend) => backend.query.includes(query))

/** What becomes of a session whose signal is aborted at the moment that `fn` names. */
async function aborted(t: Test, fn: (db: Session, abort: (reason?: unknown) => void) => Promise<unknown>) {
  const app = await buildApp(t, database)
  const controller = new AbortController()
  const { signal } = controller
  const outcome = await app.db
    .session({ signal }, (db) => fn(db, (reason) => controller.abort(reason)))
    .catch((error: unknown) => error)
  t.equal(app.db.snapshot().checkedOut, 0, 'the connection is back when it rejects')
  t.equal(getEventListeners(signal, 'abort').length, 0, 'nothing listens any more')
  return outcome
}

test('an abort cancels what runs, rolls back, and rejects with the reason', async (t) => {
  const reason = new Error('shutting down')
  const outcome = await aborted(t, async (db, abort) => {
    await add(db, 'lost')
    void eventually(() => isRunning('pg_sleep(60)'), { withinMillis: 10_000 }).then(() => abort(reason))
    await sleep.execute(db)
  })
  t.equal(outcome, reason)
  t.strictSame(await notesIn(database), [])
  await eventually(async () => !(await isRunning('pg_sleep(60)')), { withinMillis: 5000 })
})

test('an abort does not wait for a function that does something else, and its next statement is refused', async (t) => {
  const goOn = gate()
  const late = gate<unknown>()
  const outcome = await aborted(t, async (db, abort) => {
    await add(db, 'lost')
    abort()
    await goOn.opened
    await add(db, 'late').catch(late.open)
  })
  t.equal((outcome as Error).name, 'AbortError')
  goOn.open()
  t.equal(((await late.opened) as { code: string }).code, 'FST_REQUEST_DB_SESSION_ENDED')
  t.strictSame(await notesIn(database), [])
})

test('a signal that is aborted already: nothing is called, nothing opened', async (t) => {
  const app = await buildApp(t, database)
  const signal = AbortSignal.abort(new Error('too late'))
  await t.rejects(
    app.db.session({ signal }, async () => t.fail('it was called')),
    { message: 'too late' },
  )
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

test('an abort while it waits for a connection gives up its place', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 1 } })
  const holds = gate()
  const goOn = gate()
  const first = app.db.session(async (db) => {
    await add(db, 'first')
    holds.open()
    await goOn.opened
  })
  await holds.opened
  const controller = new AbortController()
  const second = app.db.session({ signal: controller.signal }, (db) => add(db, 'second'))
  await eventually(() => app.db.snapshot().waiting === 1)
  controller.abort()
  await t.rejects(second, { name: 'AbortError' })
  t.equal(app.db.snapshot().waiting, 0)
  goOn.open()
  await first
  t.strictSame(await notesIn(database), ['first'])
})

test('once COMMIT is sent it stands, and the caller is told so', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString })
  const trap = proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'hold')
  const controller = new AbortController()
  const session = app.db.session({ signal: controller.signal }, async (db) => {
    await add(db, 'kept')
    return 'done'
  })
  await trap.sprung
  controller.abort()
  trap.release()
  t.equal(await session, 'done')
  t.strictSame(await notesIn(database), ['kept'])
})

test('many jobs can share one signal, and none of them is left listening', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 } })
  const controller = new AbortController()
  const { signal } = controller
  const job = (n: number) =>
    app.db.session({ signal }, async (db) => {
      await add(db, `${n}`)
      t.ok(getEventListeners(signal, 'abort').length <= 1)
      if (n >= 40) await new Promise(() => {})
    })
  await Promise.all(Array.from({ length: 40 }, (_, n) => job(n)))
  t.equal(getEventListeners(signal, 'abort').length, 0)
  const stuck = Promise.allSettled([job(40), job(41), job(42)])
  await eventually(() => app.db.snapshot().waiting === 1, { withinMillis: 10_000 })
  controller.abort(new Error('enough'))
  t.match(await stuck, Array(3).fill({ status: 'rejected', reason: { message: 'enough' } }))
  t.equal(getEventListeners(signal, 'abort').length, 0)
  t.equal((await notesIn(database)).length, 40)
})

test('a deadline is an abort by the clock', async (t) => {
  const app = await buildApp(t, database)
  const error = await app.db
    .session({ deadlineMillis: 50 }, async (db) => {
      await add(db, 'lost')
      await sleep.execute(db)
    })
    .catch((error: unknown) => error)
  t.match(error, { name: 'TimeoutError', message: 'The session did not end within deadlineMillis (50)' })
  t.equal(app.db.snapshot().checkedOut, 0)
  t.strictSame(await notesIn(database), [])
  t.equal(await app.db.session({ deadlineMillis: 60_000 }, async (db) => (await add(db, 'kept')).length), 1)
  t.strictSame(await notesIn(database), ['kept'], 'and its timer keeps nothing alive')
})

test('a deadline holds for all attempts together', async (t) => {
  const app = await buildApp(t, database)
  let runs = 0
  const retry = { attempts: 1_000_000 }
  const session = app.db.session({ deadlineMillis: 300, retry }, async (db) => {
    runs++
    await raise('40001').execute(db)
  })
  await t.rejects(session, { name: 'TimeoutError' })
  t.ok(runs > 0)
  const before = runs
  await app.db.ping()
  t.equal(runs, before, 'there is no further attempt')
})

test('a job is tried again after a serialization failure, a deadlock and a lost connection, and committed once', async (t) => {
  const app = await buildApp(t, database)
  for (const end of ['40001', '40P01', 'lost']) {
    await database.query('delete from notes')
    const committed: number[] = []
    let runs = 0
    const result = await app.db.session({ name: 'nightly', retry: {} }, async (db) => {
      const run = ++runs
      db.afterCommit(() => committed.push(run))
      await add(db, `run ${run}`)
      if (run === 1 && end === 'lost') await terminate(database, await pidOf(db))
      if (run === 1) await (end === 'lost' ? add(db, 'more') : raise(end).execute(db))
      return run
    })
    t.equal(result, 2, end)
    t.strictSame(await notesIn(database), ['run 2'])
    t.strictSame(committed, [2])
  }
})

test('when the attempts have run out, the last error is the cause', async (t) => {
  const app = await buildApp(t, database)
  let runs = 0
  const session = app.db.session({ retry: { attempts: 2 } }, async (db) => {
    runs++
    await raise('40001').execute(db)
  })
  await t.rejects(session, { code: 'FST_REQUEST_DB_RETRIES_EXHAUSTED', statusCode: 503, cause: { code: '40001' } })
  t.equal(runs, 2)
})

test('after commit() by hand a job is not tried again', async (t) => {
  const app = await buildApp(t, database)
  let runs = 0
  const session = app.db.session({ retry: {} }, async (db) => {
    runs++
    await add(db, 'kept')
    await db.commit()
    await raise('40001').execute(db)
  })
  await t.rejects(session, { code: '40001' })
  t.equal(runs, 1)
  t.strictSame(await notesIn(database), ['kept'])
})

test('wrong options are refused, and fn is not called', async (t) => {
  const app = await buildApp(t, database)
  for (const options of [
    { signal: {} },
    { deadlineMillis: 0 },
    { deadlineMillis: '5s' },
    { retry: { attempts: 0 } },
    { retry: {}, autocommit: true },
  ] as unknown as SessionOptions[]) {
    await t.rejects(
      app.db.session(options, async () => t.fail('it was called')),
      { code: 'FST_REQUEST_DB_INVALID_OPTION' },
    )
  }
})
