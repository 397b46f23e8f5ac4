import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { add, isGone, notesIn, pidOf } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t, test } from '../support/test.ts'

// A backend that is stopped by SIGSTOP: its socket is open, the kernel takes what is sent, and nobody answers.
const server = await ownServer(t)
const database = await createDatabase(t, { sql: NOTES, server })
t.afterEach(async () => void (await database.query('delete from notes')))

/** Stops a backend; it goes on when `resume` is called, or at the end of `t`. */
function freeze(t: Test, pid: number): { resume(): void } {
  process.kill(pid, 'SIGSTOP')
  let frozen = true
  const resume = () => {
    if (frozen) process.kill(pid, 'SIGCONT')
    frozen = false
  }
  t.teardown(resume)
  return { resume }
}

test('while it is idle: the ping finds out, and nobody notices', async (t) => {
  const clock = takeClock(t)
  const app = await buildApp(t, database, { pool: { prePing: { timeoutMillis: 200 } } }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'kept')
      return pidOf(db)
    })
  })
  const first = Number((await app.inject({ method: 'POST', url: '/' })).body)
  const frozen = freeze(t, first)
  clock.advance(2000)
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.equal(answer.statusCode, 200)
  t.not(Number(answer.body), first)
  t.match(app.db.snapshot(), { open: 1, totals: { failedPings: 1, invalidated: 1 } })
  t.strictSame(await notesIn(database), ['kept', 'kept'])
  frozen.resume()
  await eventually(() => isGone(database, first))
})

test('during a statement whose client leaves: the session is over in time, and keeps nothing', async (t) => {
  const running = gate<number>()
  const app = await buildApp(t, database, { pool: { size: 1 }, settleTimeoutMillis: 300 }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'lost')
      running.open(await pidOf(db))
      await sql`select pg_sleep(30)`.execute(db)
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  const client = (await openHttp(t, app)).send('POST', '/')
  const pid = await running.opened
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep(30)')))
  const frozen = freeze(t, pid)
  const since = performance.now()
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
  t.ok(performance.now() - since < 2500, `${performance.now() - since} ms`)
  t.equal((await app.inject('/')).statusCode, 200, 'the slot is free')
  frozen.resume()
  await eventually(() => isGone(database, pid))
  t.strictSame(await notesIn(database), [])
  t.match(app.db.snapshot(), { open: 1, totals: { cancels: 1, invalidated: 1 } })
})

test('during a statement of a handler that nobody leaves: maxSessionMillis ends it', async (t) => {
  const running = gate<number>()
  const options = { pool: { size: 1 }, settleTimeoutMillis: 200, maxSessionMillis: 300 }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'lost')
      running.open(await pidOf(db))
      for (let i = 0; i < 100_000; i++) await sql`select 1`.execute(db)
    })
  })
  const answer = app.inject({ method: 'POST', url: '/' })
  const pid = await running.opened
  const frozen = freeze(t, pid)
  t.ok((await answer).statusCode >= 500)
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, totals: { commits: 0 } })
  frozen.resume()
  await eventually(() => isGone(database, pid))
  t.strictSame(await notesIn(database), [])
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`${commitOn}: during COMMIT: COMMIT_UNKNOWN, which is the truth, since the server may still run it`, async (t) => {
    const options = { commitOn, pool: { size: 1 }, settleTimeoutMillis: 300 }
    const inserted = gate<number>()
    const goOn = gate()
    const app = await buildApp(t, database, options, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'perhaps')
        inserted.open(await pidOf(db))
        await goOn.opened
      })
      app.get('/', ({ db }) => pidOf(db))
    })
    const answer = app.inject({ method: 'POST', url: '/' })
    const pid = await inserted.opened
    const frozen = freeze(t, pid)
    goOn.open()
    if (commitOn === 'onSend') {
      t.match((await answer).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
    } else t.equal((await answer).statusCode, 200)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(app.db.snapshot(), { open: 0, totals: { commits: 0, failedCommits: 1 } })
    t.equal((await app.inject('/')).statusCode, 200)
    frozen.resume()
    await eventually(() => isGone(database, pid))
    t.strictSame(await notesIn(database), ['perhaps'], 'here it did')
  })

  test(`${commitOn}: during ROLLBACK: the answer is the error that led to it`, async (t) => {
    const options = { commitOn, pool: { size: 1 }, settleTimeoutMillis: 300 }
    const inserted = gate<number>()
    const goOn = gate()
    const app = await buildApp(t, database, options, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        inserted.open(await pidOf(db))
        await goOn.opened
        throw new Error('mine')
      })
    })
    const answer = app.inject({ method: 'POST', url: '/' })
    const pid = await inserted.opened
    const frozen = freeze(t, pid)
    goOn.open()
    t.match((await answer).json(), { statusCode: 500, message: 'mine' })
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.match(app.db.snapshot(), { open: 0, totals: { invalidated: 1 } })
    frozen.resume()
    await eventually(() => isGone(database, pid))
    t.strictSame(await notesIn(database), [])
  })
}
