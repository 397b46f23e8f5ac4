import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { takeClock } from '../support/clock.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t, test } from '../support/test.ts'

const server = await ownServer(t)
const database = await createDatabase(t, { sql: NOTES, server })
t.afterEach(async () => void (await database.query('delete from notes')))

const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }
const UNAVAILABLE = { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' }
/** What a request can be told while its server goes away. */
const HONEST = ['CONNECTION_LOST', 'UNAVAILABLE', 'COMMIT_UNKNOWN'].map((code) => `FST_REQUEST_DB_${code}`)

/** An app with five idle connections. */
async function setUp(t: Test, prePing: boolean) {
  const clock = takeClock(t)
  const five = gate()
  let inside = 0
  const pool = { size: 5, ...(!prePing && { prePing: false as const }) }
  const app = await buildApp(t, database, { pool }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
    app.get('/five', async ({ db }) => {
      await pidOf(db)
      if (++inside === 5) five.open()
      await five.opened
    })
    app.post('/:note', async ({ db, params }) => {
      await add(db, (params as { note: string }).note)
    })
  })
  await Promise.all([1, 2, 3, 4, 5].map(() => app.inject('/five')))
  t.match(app.db.snapshot(), { open: 5, idle: 5 })
  const pids = (await database.backends()).map(({ pid }) => pid)
  return { app, clock, pids }
}

for (const prePing of [true, false]) {
  for (const how of ['stop', 'kill'] as const) {
    test(`prePing ${prePing}: five idle connections survive a server that is ${how}ed and started`, async (t) => {
      const { app, clock, pids } = await setUp(t, prePing)
      await server[how]()
      await server.start()
      clock.advance(2000)
      const answers = await Promise.all(
        Array.from({ length: 10 }, (_, i) => app.inject({ method: 'POST', url: `/${i}` })),
      )
      t.strictSame(
        answers.map(({ statusCode }) => statusCode),
        Array(10).fill(200),
      )
      t.equal((await notesIn(database)).length, 10)
      const now = (await database.backends()).map(({ pid }) => pid)
      t.notOk(
        now.some((pid) => pids.includes(pid)),
        'all older connections are replaced',
      )
      t.match(app.db.snapshot(), { open: now.length, idle: now.length, totals: { invalidated: 5 } })
    })
  }
}

test('a server that stops under a session is CONNECTION_LOST, and UNAVAILABLE until it is back', async (t) => {
  const { app } = await setUp(t, true)
  const begun = gate()
  const goOn = gate()
  const lost = app.db.session(async (db) => {
    await add(db, 'lost')
    begun.open()
    await goOn.opened
    await add(db, 'never')
  })
  await begun.opened
  await server.stop()
  goOn.open()
  await t.rejects(lost, LOST)
  for (let i = 0; i < 3; i++) t.match((await app.inject('/')).json(), UNAVAILABLE)
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  await server.start()
  t.equal((await app.inject({ method: 'POST', url: '/kept' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['kept'])
})

test('a server that crashes under a long statement is CONNECTION_LOST at once', async (t) => {
  const { app } = await setUp(t, true)
  const sleeping = t.rejects(
    app.db.session((db) => sql`select pg_sleep(30)`.execute(db)),
    LOST,
  )
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep')))
  await server.kill()
  await sleeping
  await server.start()
  await eventually(async () => (await app.inject('/')).statusCode === 200)
})

test('under load, over a restart and a crash: every 2xx is kept, and what is called rolled back is not', async (t) => {
  const { app } = await setUp(t, true)
  const accepted: string[] = []
  const refused: string[] = []
  let running = true
  let sent = 0
  const user = async () => {
    while (running && sent < 20_000) {
      const note = `n${++sent}`
      const answer = await app.inject({ method: 'POST', url: `/${note}` })
      if (answer.statusCode === 200) accepted.push(note)
      else {
        const { code } = answer.json<{ code: string }>()
        if (!HONEST.includes(code)) t.fail(answer.body)
        if (code !== 'FST_REQUEST_DB_COMMIT_UNKNOWN') refused.push(note)
        // A user who is refused takes a breath.
        await new Promise((resolve) => setImmediate(resolve))
      }
    }
  }
  const users = Array.from({ length: 8 }, user)
  for (const how of ['stop', 'kill'] as const) {
    const before = accepted.length
    await eventually(() => accepted.length > before + 50, { withinMillis: 10_000 })
    await server[how]()
    await eventually(() => refused.length > 0)
    await server.start()
  }
  const before = accepted.length
  await eventually(() => accepted.length > before + 50, { withinMillis: 10_000 })
  running = false
  await Promise.all(users)
  const kept = new Set(await notesIn(database))
  t.equal(accepted.filter((note) => !kept.has(note)).length, 0, 'nothing that was answered 200 is missing')
  t.equal(refused.filter((note) => kept.has(note)).length, 0, 'nothing that was called rolled back is there')
  t.match(app.db.snapshot(), { checkedOut: 0, waiting: 0 })
})
