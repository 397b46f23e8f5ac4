import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, buildPooledApp, poolOf } from '../support/pooled-app.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

// Time for what must not follow to follow, and to reach PgBouncer, before COMMIT is answered.
const SLOW_COMMIT = `
  create function takes_its_time() returns trigger language plpgsql as 'begin perform pg_sleep(0.3); return null; end';
  create constraint trigger slow after insert on notes deferrable initially deferred
    for each row when (new.note = 'slow') execute function takes_its_time()`

const database = await createDatabase(t, { sql: `${NOTES}; ${SLOW_COMMIT}` })
t.afterEach(async () => void (await database.query('delete from notes')))

/** One server connection, an app with one connection to PgBouncer, and a proxy between them that can split packets. */
async function narrow(t: Test, routes: (app: FastifyInstance) => unknown) {
  const bouncer = await startPgBouncer(t, database.connectionString, { default_pool_size: 1 })
  const proxy = await startProxy(t, bouncer.connectionString)
  const app = await buildPooledApp(t, database, proxy, { pool: { size: 1 } }, routes)
  const waiting = async () => Number((await poolOf(bouncer, database)).cl_waiting)
  const stranger = async (note: string) => {
    const client = new pg.Client({ connectionString: bouncer.connectionString })
    await client.connect()
    try {
      await client.query('begin')
      await client.query('insert into notes (note) values ($1)', [note])
      await client.query('commit')
    } finally {
      await client.end()
    }
  }
  return { proxy, app, waiting, stranger }
}

bouncerTest('nobody follows behind a COMMIT, which PgBouncer could answer by giving the server away', async (t) => {
  const written = gate()
  const go = gate()
  const { proxy, app, waiting, stranger } = await narrow(t, (app) => {
    app.post('/slow', async ({ db }) => {
      await add(db, 'slow')
      written.open()
      await go.opened
    })
    app.post('/undone', async ({ db }) => {
      await add(db, 'undone')
      throw new Error('undo it')
    })
  })
  const slow = app.inject({ method: 'POST', url: '/slow' })
  await written.opened
  const split = proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'hold', { place: 'after' })
  const undone = app.inject({ method: 'POST', url: '/undone' })
  await eventually(() => app.db.snapshot().waiting === 1)
  go.open()
  await split.sprung
  t.equal((await slow).statusCode, 200)
  // A part of the next flight has left, its Sync has not: the server must be the app's.
  const other = stranger('of a stranger')
  await eventually(async () => (await waiting()) === 1, { withinMillis: 5000 })
  split.release()
  t.equal((await undone).statusCode, 500)
  await other
  t.strictSame(await notesIn(database), ['slow', 'of a stranger'])
  t.equal(app.db.snapshot().totals.handOvers, 0)
})

bouncerTest('autocommit statements leave one by one, each when the one before it is answered', async (t) => {
  const { proxy, app } = await narrow(t, (app) => {
    app.post('/', { config: { db: { autocommit: true } } }, async ({ db }) => {
      await Promise.all(['one', 'two', 'three'].map((note) => add(db, note)))
    })
    app.post('/transaction', async ({ db }) => {
      await sql`select 1`.execute(db)
      await Promise.all(['four', 'five'].map((note) => add(db, note)))
    })
  })
  await app.db.ping()
  const answered = proxy.trap({ from: 'server', type: 'Z' }, 'hold', { place: 'before' })
  const asked = app.inject({ method: 'POST', url: '/' })
  await answered.sprung
  proxy.clear()
  // Whatever was sent before this has arrived by now.
  await eventually(async () => (await notesIn(database)).length > 0)
  t.strictSame(await notesIn(database), ['one'])
  answered.release()
  t.equal((await asked).statusCode, 200)
  t.strictSame(await notesIn(database), ['one', 'two', 'three'])
  // On the same connection, a transaction's statements leave together again.
  proxy.clear()
  t.equal((await app.inject({ method: 'POST', url: '/transaction' })).statusCode, 200)
  t.equal(proxy.roundTrips(), 3)
  t.strictSame(await notesIn(database), ['one', 'two', 'three', 'four', 'five'])
})

bouncerTest('a statement of an autocommit session that fails does not stop the ones behind it', async (t) => {
  const { app } = await narrow(t, (app) => {
    app.post('/', { config: { db: { autocommit: true } } }, async ({ db }) => {
      const results = await Promise.allSettled([add(db, 'one'), sql`select 1/0`.execute(db), add(db, 'two')])
      return results.map(({ status }) => status)
    })
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.strictSame(answer.json(), ['fulfilled', 'rejected', 'fulfilled'])
  t.strictSame(await notesIn(database), ['one', 'two'])
})
