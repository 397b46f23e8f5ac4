import { sql } from 'kysely'
import type { RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

/** An app that echoes, and what it has said since it was ready, but for Fastify's own lines. */
async function echoing(t: Test, options: RequestDbOptions) {
  const log = captureLog()
  const app = await buildApp(
    t,
    database,
    options,
    (app) => {
      app.post('/notes', async ({ db }) => {
        db.add(db.insertInto('notes').values({ note: 'secret' }))
        await db.flush()
        return 'ok'
      })
      app.get('/read', ({ db }) => sql`select ${1}::bigint as n, ${'x'}::text as note`.execute(db))
      app.get('/unused', async ({ db }) => db.state)
      app.post('/lost', async ({ db }) => {
        await db.insertInto('notes').values({ note: 'secret' }).execute()
        throw new Error('mine')
      })
      app.get('/wrong', ({ db }) => sql`select 1 from nowhere`.execute(db))
      app.get('/block', async ({ db }) => {
        await db.begin()
        await sql`select 1`.execute(db)
        await db.commit()
        return 'ok'
      })
    },
    { logger: log.options },
  )
  const lines = () => log.lines.filter(({ requestDb }) => requestDb !== undefined && 'event' in (requestDb as object))
  const said = () => lines().map(({ msg }) => msg.replace(/[\d.]+ ms/, 'n ms'))
  return { app, log, lines, said }
}

test('add and flush, commit: in the words and the order of SQLAlchemy', async (t) => {
  const { app, said, lines } = await echoing(t, { echo: true, echoPool: true })
  await app.inject({ method: 'POST', url: '/notes' })
  t.strictSame(said(), [
    'connection 1 opened',
    'connection 1 checked out',
    'BEGIN (implicit)',
    'insert into "notes" ("note") values ($1) [n ms, 1 row]',
    'COMMIT',
    'connection 1 returned',
  ])
  for (const line of lines().slice(1)) t.equal(line.reqId, 'req-1', 'each bears the id of its request')
  t.match(lines()[3]?.requestDb, { event: 'statement', method: 'POST', route: '/notes', rowCount: 1 })
  t.notMatch(JSON.stringify(lines()), /secret/, 'parameters are hidden')
})

test('one read, and a session that is never used', async (t) => {
  const { app, said } = await echoing(t, { echo: true, echoPool: true })
  await app.inject('/unused')
  t.strictSame(said(), [])
  await app.inject('/read')
  t.strictSame(said().slice(1), [
    'connection 1 checked out',
    'BEGIN (implicit)',
    'select $1::bigint as n, $2::text as note [n ms, 1 row]',
    'COMMIT',
    'connection 1 returned',
  ])
})

test('a nested transaction is a savepoint, which is kept or undone', async (t) => {
  const { app, said } = await echoing(t, { echo: true })
  await app.db.session(async (db) => {
    await db.transaction().execute((db) => sql`select 1`.execute(db))
    await db
      .transaction()
      .execute((db) => sql`select 1 from nowhere`.execute(db))
      .catch(() => {})
  })
  t.strictSame(said(), [
    'BEGIN (implicit)',
    'SAVEPOINT request_db_1 [n ms]',
    'select 1 [n ms, 1 row]',
    'RELEASE SAVEPOINT request_db_1 [n ms]',
    'SAVEPOINT request_db_2 [n ms]',
    'select 1 from nowhere [n ms, failed: 42P01]',
    'ROLLBACK TO SAVEPOINT request_db_2 [n ms]',
    'RELEASE SAVEPOINT request_db_2 [n ms]',
    'COMMIT',
  ])
})

test('a request that fails is rolled back on return; an explicit block begins by itself', async (t) => {
  const { app, said } = await echoing(t, { echo: true, echoPool: true })
  await app.inject({ method: 'POST', url: '/lost' })
  await eventually(() => said().length === 7)
  t.strictSame(said().slice(4), ['connection 1 rollback on return', 'ROLLBACK', 'connection 1 returned'])
  await app.inject('/block')
  t.strictSame(said().slice(7), [
    'connection 1 checked out',
    'BEGIN',
    'select 1 [n ms, 1 row]',
    'COMMIT',
    'connection 1 returned',
  ])
})

test('a statement that fails says how', async (t) => {
  const { app, said } = await echoing(t, { echo: true })
  await app.inject('/wrong')
  t.strictSame(said().slice(0, 2), ['BEGIN (implicit)', 'select 1 from nowhere [n ms, failed: 42P01]'])
})

test('rows with debug, parameters where they are asked for', async (t) => {
  const { app, lines } = await echoing(t, { echo: 'debug', echoParameters: true })
  await app.inject('/read')
  t.match(lines()[1]?.requestDb, { rows: [{ n: '1', note: 'x' }], parameters: ['1', 'x'] })
})

test('outside of a request it speaks through the log of the instance, and of waits with debug', async (t) => {
  const { app, said, lines } = await echoing(t, { echoPool: 'debug' })
  await app.db.session((db) => sql`select 1`.execute(db))
  t.strictSame(said(), [
    'connection 1 opened',
    'waited n ms for a connection: granted',
    'connection 1 checked out',
    'connection 1 returned',
  ])
  t.equal(lines()[2]?.reqId, undefined)
})

test('what happens to connections in the end', async (t) => {
  const { app, said } = await echoing(t, { echoPool: true, pool: { size: 1, maxOverflow: 1 } })
  await app.db.session(async (db) => {
    await sql`select 1`.execute(db)
    await app.db.session((other) => sql`select 1`.execute(other))
  })
  await eventually(() => said().some((line) => line.endsWith('closed (overflow)')))
  await app.inject('/read')
  await app.db.session((db) => sql`select pg_terminate_backend(pg_backend_pid())`.execute(db)).catch(() => {})
  t.ok(said().some((line) => /^connection \d invalidated: terminating connection/.test(line)))
})
