import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { RequestDbOptions, Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { openHttp } from '../support/http-client.ts'
import { get, says, watchRefusals } from '../support/refusals.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

// Where several routes share the pool, or one cause looks like another: found by using the plugin in unkind ways.

const database = await createDatabase(t, { sql: `${NOTES}; insert into notes (note) values ('one')` })
const appOf = (t: Test, options: RequestDbOptions, routes: (app: FastifyInstance) => unknown) =>
  watchRefusals(t, database, options, routes)
const one = (db: Session) => sql`select 1`.execute(db)
const sleep = (db: Session, seconds: number) => sql`select pg_sleep(${seconds})`.execute(db)

async function think(db: Session): Promise<void> {
  await one(db)
  await pause(300)
}

for (const [cause, hold] of [
  ['slow-sql', (db: Session) => sleep(db, 0.3)],
  ['held-idle', think],
] as const) {
  test(`${cause}: a few requests that hold for long, among many that are quick`, async (t) => {
    const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 250 } }, (app) => {
      app.get('/guilty', async ({ db }) => {
        await hold(db)
        return 'ok'
      })
      app.get('/quick', ({ db }) => one(db))
    })
    await get(watched.app, '/quick', 100)
    await Promise.all([get(watched.app, '/guilty', 4), get(watched.app, '/quick', 20)])
    says(t, watched, cause, 'GET /guilty')
  })
}

test('held-idle: the raw client is lent out, and nothing is asked of it', async (t) => {
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 250 } }, (app) => {
    app.get('/raw', async ({ db }) => {
      await db.withClient(async (client) => {
        await client.query('select 2')
        await pause(200)
      })
      return 'ok'
    })
  })
  await get(watched.app, '/raw', 8)
  const report = says(t, watched, 'held-idle', 'GET /raw')
  t.equal(report.holders[0]?.lastStatement, 'select 2')
})

test('slow-sql: through the raw client', async (t) => {
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 250 } }, (app) => {
    app.get('/raw', async ({ db }) => {
      await db.withClient((client) => client.query({ text: 'select pg_sleep(0.3)' }))
      return 'ok'
    })
  })
  await get(watched.app, '/raw', 4)
  const report = says(t, watched, 'slow-sql', 'GET /raw')
  t.equal(report.holders[0]?.lastStatement, 'select pg_sleep(0.3)')
})

test('an error handler that writes an audit row is no hold-and-wait: its request is done with its connection', async (t) => {
  const watched = await appOf(t, { pool: { size: 1 }, leakDetectionMillis: 60_000 }, (app) => {
    app.setErrorHandler(async (_error, _request, reply) => {
      await app.db.session((db) => db.insertInto('notes').values({ note: 'audit' }).execute())
      return reply.code(500).send('failed')
    })
    app.get('/fails', async ({ db }) => {
      await one(db)
      throw new Error('mine')
    })
  })
  await get(watched.app, '/fails', 4)
  t.strictSame(watched.reports(), [])
})

test('a pipelined request is not taken for a part of the one before it', async (t) => {
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 250 }, leakDetectionMillis: 60_000 }, (app) => {
    app.get('/first', async ({ db }) => {
      await one(db)
      await pause(600)
      return 'first'
    })
    app.get('/second', ({ db }) => one(db))
  })
  const client = await openHttp(t, watched.app)
  client.send('GET', '/first')
  client.send('GET', '/second')
  await client.response()
  t.equal((await client.response()).status, 503)
  says(t, watched, 'held-idle', 'GET /first')
})

test('lock-wait is in the log also where nobody may wait for a connection', async (t) => {
  const blocker = await database.client()
  t.teardown(() => blocker.end())
  await blocker.query(`set application_name = 'an import'; begin; lock table notes in access exclusive mode`)
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 0 } }, (app) => {
    app.get('/victim', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  const first = watched.app.inject('/victim')
  await eventually(() => watched.app.db.snapshot().holders.some(({ stateMillis }) => stateMillis > 150))
  const [refused] = await get(watched.app, '/victim', 1)
  t.equal(refused?.statusCode, 503)
  await eventually(() => watched.reports().length > 0)
  await blocker.query('rollback')
  await first
  t.match(watched.reports()[0]?.msg, /verdict lock-wait: .* held by somebody outside of this pool \(an import/)
  t.match(watched.refusals[0]?.report?.verdict, { cause: 'lock-wait' }, 'the error has it too by now')
})

test('what the server said about one incident is not said of the next', async (t) => {
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 300 } }, (app) => {
    app.get('/holder', async ({ db }) => {
      await sql`update notes set note = 'held' where id = 1`.execute(db)
      await pause(900)
      return 'ok'
    })
    app.get('/blocked', ({ db }) => sql`update notes set note = 'mine' where id = 1`.execute(db))
    app.get('/slow', ({ db }) => sleep(db, 0.5))
  })
  const held = watched.app.inject('/holder')
  await eventually(() => watched.app.db.snapshot().holders[0]?.state === 'idle')
  await get(watched.app, '/blocked', 4)
  await held
  says(t, watched, 'lock-wait', 'GET /holder')
  watched.refusals.length = 0
  await get(watched.app, '/slow', 6)
  t.ok(watched.refusals.length > 0)
  for (const { report } of watched.refusals) t.match(report?.verdict, { cause: 'slow-sql', routes: ['GET /slow'] })
})
