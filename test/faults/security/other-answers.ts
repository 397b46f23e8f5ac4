import type { FastifyInstance } from 'fastify'
import { type Kysely, sql } from 'kysely'
import type { DatabaseSchema, SessionOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { captureLog } from '../../support/captured-log.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { openHttp } from '../../support/http-client.ts'
import { add, notesIn, pidOf } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* The codes that come of how an app uses its session, or of how it ends; and what the log makes of parameters. */

const SECRET = 'parameter-4711'
const database = await createDatabase(t, {
  sql: `${NOTES}; create table hidden_parent (id int primary key);
    create table hidden_child (parent int references hidden_parent deferrable initially deferred)`,
})
t.beforeEach(() => database.query('delete from notes'))
const { hostname, username, port } = new URL(database.connectionString)

/** Nothing of the inside. */
function saysNothing(t: Test, text: string): void {
  const inside = [hostname, username, `:${port}`, database.name, '/hidden-route', 'hidden_', SECRET]
  for (const word of [...inside, 'insert into', 'select ', 'node_modules']) {
    t.notOk(text.includes(word), `nothing of ${word} in ${text}`)
  }
}

const misuses: [string, (db: Kysely<DatabaseSchema>, app: FastifyInstance) => Promise<unknown>][] = [
  ['23503', (db) => sql`insert into hidden_child values (${4711})`.execute(db)],
  [
    'FST_REQUEST_DB_NESTED_CONFLICT',
    async (db) => {
      const trx = await db.startTransaction().execute()
      try {
        await add(db, SECRET)
      } finally {
        await trx.rollback().execute()
      }
    },
  ],
  [
    'FST_REQUEST_DB_INVALID_OPTION',
    (_, app) => app.db.session({ isolationLevel: 'none' } as unknown as SessionOptions, (db) => add(db, SECRET)),
  ],
  [
    'FST_REQUEST_DB_SESSION_ENDED',
    async (_, app) => {
      const ended = await app.db.session(async (db) => db)
      await add(ended, SECRET)
    },
  ],
]

for (const [code, misuse] of misuses) {
  test(`an answer with ${code} tells nothing of the inside`, async (t) => {
    const app = await buildApp(t, database, {}, (app) => {
      app.post('/hidden-route', async ({ db }) => {
        await misuse(db, app)
        return 'done'
      })
    })
    const { statusCode, body, headers, json } = await app.inject({ method: 'POST', url: '/hidden-route' })
    t.equal(statusCode, 500)
    t.equal(json().code, code)
    saysNothing(t, body + JSON.stringify(headers))
    t.strictSame(await notesIn(database), [])
  })
}

test('an answer with POOL_CLOSED tells nothing of the inside', async (t) => {
  const held = gate()
  const goOn = gate()
  const options = { pool: { size: 1 }, closeGraceMillis: 5000 }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/hidden-route', async ({ db }) => {
      const pid = await pidOf(db)
      held.open()
      await goOn.opened
      return pid
    })
    app.get('/hidden-route/waits', ({ db }) => pidOf(db))
  })
  const holder = (await openHttp(t, app)).send('GET', '/hidden-route')
  await held.opened
  const waits = (await openHttp(t, app)).send('GET', '/hidden-route/waits')
  await eventually(() => app.db.snapshot().waiting === 1)
  const closed = app.close()
  const { status, headers, body } = await waits.response()
  goOn.open()
  t.equal((await holder.response()).status, 200)
  for (const client of [holder, waits]) client.destroy()
  await closed
  t.equal(status, 503)
  t.equal(JSON.parse(body).code, 'FST_REQUEST_DB_POOL_CLOSED')
  saysNothing(t, body + JSON.stringify(headers))
})

test('what the plugin logs has no parameters, also of statements that fail, unless it is asked for', async (t) => {
  const said = async (echoParameters: boolean) => {
    const log = captureLog('trace')
    const options = { echo: true, echoPool: 'debug', echoParameters } as const
    const routes = (app: FastifyInstance) =>
      app.post('/', async ({ db }) => {
        await add(db, SECRET)
        await db
          .transaction()
          .execute((trx) => sql`select ${SECRET}::int`.execute(trx))
          .catch(() => {})
        for await (const _ of db.selectFrom('notes').select('id').where('note', '=', SECRET).stream(1));
        db.add(db.insertInto('notes').values({ note: SECRET }))
        return 'done'
      })
    const app = await buildApp(t, database, options, routes, { logger: log.options })
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
    t.ok(log.lines.some(({ msg }) => msg.includes('failed: 22P02')))
    return JSON.stringify(log.lines)
  }
  t.notMatch(await said(false), SECRET)
  t.match(await said(true), SECRET, 'where it is asked for')
  t.strictSame(await notesIn(database), [SECRET, SECRET, SECRET, SECRET])
})
