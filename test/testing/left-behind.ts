import Fastify from 'fastify'
import { sql } from 'kysely'
import requestDb from '../../lib/index.ts'
import { beginTest, type SessionWatch, watchSessions } from '../../lib/testing.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { add } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* assertNothingLeft(): what a request has left behind, by its route. */

const database = await createDatabase(t, { sql: NOTES })

for (const way of ['beginTest', 'watchSessions'] as const) {
  test(`${way}: a statement that nobody awaited, a nested transaction left open, a connection kept`, async (t) => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(requestDb, { connectionString: database.connectionString, capacityCheck: false })
    const goOn = gate()
    const holds = gate()
    app.get('/fine', async ({ db }) => add(db, 'x').then(() => 'ok'))
    app.get('/unawaited', async ({ db }) => {
      await add(db, 'x')
      void sql`select pg_sleep(0.05)`.execute(db).catch(() => {})
      return 'ok'
    })
    app.get('/first-unawaited', async ({ db }) => {
      void add(db, 'x').catch(() => {})
      return 'ok'
    })
    app.get('/nested', async ({ db }) => {
      await add(db, 'x')
      const begun = gate()
      void db
        .transaction()
        .execute(async () => {
          begun.open()
          await new Promise(() => {})
        })
        .catch(() => {})
      await begun.opened
      return 'ok'
    })
    app.get('/kept', async ({ db }) => {
      await add(db, 'x')
      holds.open()
      await goOn.opened
      return 'ok'
    })
    await app.ready()
    const transaction = way === 'beginTest' ? await beginTest(app) : undefined
    const watch: SessionWatch = transaction ?? watchSessions(app)
    await app.inject('/fine')
    await watch.assertNothingLeft()
    await app.inject('/unawaited')
    await t.rejects(watch.assertNothingLeft(), {
      message: /GET \/unawaited did not await a statement: select pg_sleep/,
    })
    await app.inject('/first-unawaited')
    await t.rejects(watch.assertNothingLeft(), {
      message: /GET \/first-unawaited did not await a statement: insert into/,
    })
    await app.inject('/nested')
    await t.rejects(watch.assertNothingLeft(), { message: /GET \/nested left a nested transaction/ })
    await watch.assertNothingLeft()
    const kept = app.inject('/kept')
    await holds.opened
    await t.rejects(watch.assertNothingLeft(10), {
      message: /GET \/kept holds a connection with an open transaction, last: insert into/,
    })
    goOn.open()
    await kept
    await watch.assertNothingLeft()
    await transaction?.rollback()
  })
}
