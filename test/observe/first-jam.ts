import { setTimeout as pause } from 'node:timers/promises'
import { sql } from 'kysely'
import type { Report, RequestDbError } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { t, test } from '../support/test.ts'

// In a process of its own, because up to Node 22 requests are followed only once a second session has had to wait. The
// order of these two tests matters: the first finds a process in which none has.

const database = await createDatabase(t)

const SLOW = { name: 'after something else', between: () => pause(30) }
const QUICK = { name: 'right after its first statement', between: async () => {} }

for (const { name, between } of [SLOW, QUICK]) {
  test(`the first jam of a process is found, ${name}`, async (t) => {
    const log = captureLog()
    const refusals: RequestDbError[] = []
    const routes = (app: Awaited<ReturnType<typeof buildApp>>) => {
      app.addHook('onError', async (_request, _reply, error) => void refusals.push(error as RequestDbError))
      app.get('/audit', async ({ db }) => {
        await sql`select 1`.execute(db)
        await between()
        await app.db.session((own) => sql`select 2`.execute(own))
        return 'ok'
      })
    }
    const app = await buildApp(t, database, { pool: { size: 2, timeoutMillis: 300 } }, routes, { logger: log.options })
    await Promise.all([app.inject('/audit'), app.inject('/audit'), app.inject('/audit')])
    t.ok(refusals.length > 0)
    for (const { report } of refusals) {
      t.match(report?.verdict, { cause: 'hold-and-wait', routes: ['GET /audit'] }, report?.verdict?.sentence ?? '')
    }
  })
}

test('a jam is told of at once, long before anybody is refused', async (t) => {
  const log = captureLog()
  const over = gate()
  const app = await buildApp(
    t,
    database,
    { pool: { size: 1, timeoutMillis: 60_000 } },
    (app) => {
      app.get('/audit', async ({ db }) => {
        await sql`select 1`.execute(db)
        const second = app.db.session((own) => sql`select 2`.execute(own))
        await over.opened
        await db.commit()
        await second
        return 'ok'
      })
    },
    { logger: log.options },
  )
  const answer = app.inject('/audit')
  const reports = () =>
    log.lines.map(({ requestDb }) => requestDb as Report & { event?: string }).filter((one) => one?.event === 'report')
  await eventually(() => reports().length === 1)
  t.match(reports()[0]?.verdict, { cause: 'hold-and-wait', routes: ['GET /audit'] })
  t.match(String(reports()[0]?.verdict?.evidence.waitsAt), /first-jam\.ts/)
  over.open()
  t.equal((await answer).statusCode, 200)
})
