import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { Response } from 'light-my-request'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// COPY through a statement of the session instead of through withClient(fn): a mistake that must not hang.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const copy = (db: Session) => sql`copy notes (note) from stdin`.execute(db)
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

/** A request that is given up when the answer does not come, so that one test that hangs does not take the rest along. */
const post = (app: FastifyInstance): Promise<Response> =>
  app.inject({ method: 'POST', url: '/', signal: AbortSignal.timeout(2500) })

t.beforeEach(() => database.query('truncate notes restart identity'))

for (const [when, handler] of [
  ['as the first statement', copy],
  [
    'as a later statement',
    async (db: Session) => {
      await insert(db, 'A')
      await copy(db)
    },
  ],
  ['among first statements', (db: Session) => Promise.all([insert(db, 'A'), copy(db), insert(db, 'B')])],
  [
    'among later statements',
    async (db: Session) => {
      await insert(db, 'A')
      await Promise.all([insert(db, 'B'), copy(db), insert(db, 'C'), insert(db, 'D')])
    },
  ],
  [
    'as a write that was added',
    (db: Session) => {
      db.add({ compile: () => sql`copy notes (note) from stdin`.compile(db) })
      return 'ok'
    },
  ],
  ['inside a nested transaction', (db: Session) => db.transaction().execute(() => copy(db))],
] as const) {
  test(`COPY FROM STDIN ${when} is refused at once, and nothing is kept`, async (t) => {
    const { app } = await oneRoute(t, database, handler, { pool: { size: 1 } })
    t.match(await post(app), { statusCode: /50[03]/ })
    t.strictSame(await notes(), [])
    t.match(await post(app), { statusCode: /50[03]/ })
    await app.db.session((db) => insert(db, 'the pool works'))
    t.strictSame(await notes(), ['the pool works'])
  })
}

test('the refusal says what to do', async (t) => {
  const { app } = await oneRoute(t, database, async (db) => {
    const error = (await copy(db).catch((error: unknown) => error)) as Error
    t.match(`${error.message} ${String(error.cause)}`, /withClient/)
    throw error
  })
  t.match(await post(app), { statusCode: /50[03]/ })
})

test('COPY FROM STDIN that is refused and swallowed does not pass for a success', async (t) => {
  const { app } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await copy(db).catch(() => {})
    return 'went on'
  })
  t.match(await post(app), { statusCode: /50[03]/ })
  t.strictSame(await notes(), [])
})

test('COPY TO STDOUT harms nobody', async (t) => {
  const { app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'A')
      await sql`copy notes to stdout`.execute(db).catch(() => {})
      const { rows } = await sql`select 'mine' as whose`.execute(db)
      t.strictSame(rows, [{ whose: 'mine' }])
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  const statuses = [(await post(app)).statusCode, (await post(app)).statusCode]
  t.equal(statuses[0], statuses[1])
  t.equal((await notes()).length, statuses[0] === 200 ? 2 : 0)
})
