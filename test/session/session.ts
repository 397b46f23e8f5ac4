import { CamelCasePlugin, Kysely } from 'kysely'
import type { Session as AppSession } from '../../lib/index.ts'
import { Session } from '../../lib/session/session.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<AppSession, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('request.db is a Session, a Session is a Kysely, and what is derived from one is one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const derived = [
      db,
      db.withPlugin(new CamelCasePlugin()),
      db.withoutPlugins(),
      db.withSchema('public'),
      db.withTables<{ more: { id: number } }>(),
    ]
    for (const one of derived) {
      t.ok(one instanceof Session)
      t.ok(one instanceof Kysely)
    }
    await db.destroy()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('each of its methods', async (t) => {
  const called: string[] = []
  const { post } = await oneRoute(t, database, async (db) => {
    t.strictSame([db.state, db.inTransaction], ['idle', false])
    await db.begin()
    t.strictSame([db.state, db.inTransaction], ['begun', true])
    db.add(db.insertInto('notes').values({ note: 'added' }))
    await db.flush()
    db.afterCommit(() => called.push('committed'))
    await db.withClient((client) => client.query("insert into notes (note) values ('raw')"))
    await db.transaction().execute((trx) => insert(trx, 'nested'))
    await db.commit()
    db.afterRollback(() => called.push('rolled back'))
    await insert(db, 'dropped')
    await db.rollback()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['added', 'raw', 'nested'])
  t.strictSame(called, ['committed', 'rolled back'])
})

test('a nested transaction has no isolation level or access mode of its own', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const conflict = { code: 'FST_REQUEST_DB_NESTED_CONFLICT' }
    await t.rejects(
      db
        .transaction()
        .setIsolationLevel('serializable')
        .execute(async () => {}),
      conflict,
    )
    await t.rejects(
      db
        .transaction()
        .setAccessMode('read only')
        .execute(async () => {}),
      conflict,
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('what has begun and was lost is failed; what has ended is ended', async (t) => {
  let kept: AppSession | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    kept = db
    await t.rejects(
      db
        .insertInto('notes')
        .values({ note: null as unknown as string })
        .execute(),
      { code: '23502' },
    )
    t.equal(db.state, 'failed')
    throw new Error('mine')
  })
  t.equal((await post()).statusCode, 500)
  t.equal(kept?.state, 'ended')
})
