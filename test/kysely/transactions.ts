import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { t } from '../support/test.ts'
import { answers, ZOO, type ZooSession } from '../support/zoo.ts'

/* Kysely's own ways to transactions, which are savepoints on a session. */

const database = await createDatabase(t, { sql: ZOO })
const add = (db: Pick<ZooSession, 'insertInto'>, name: string) => db.insertInto('people').values({ name }).execute()
const added = async (db: ZooSession) =>
  (await db.selectFrom('people').select('name').where('id', '>', 3).orderBy('id').execute()).map(({ name }) => name)

answers(database, {
  'a callback that returns is kept, one that throws is not': [
    async (db) => {
      const result = await db.transaction().execute(async (trx) => {
        await add(trx, 'kept')
        return trx.isTransaction
      })
      const error = await db
        .transaction()
        .execute(async (trx) => {
          await add(trx, 'lost')
          throw new Error('no')
        })
        .catch((error: Error) => error.message)
      return [result, error, await added(db)]
    },
    [true, 'no', ['kept']],
  ],
  'a statement that fails in it spoils it alone': [
    async (db) => {
      await db
        .transaction()
        .execute((trx) => add(trx, 'Ada'))
        .catch(() => {})
      await add(db, 'after')
      return added(db)
    },
    ['after'],
  ],
  'one in another, and savepoints of a controlled one': [
    async (db) => {
      await db.transaction().execute(async (trx) => {
        await add(trx, 'outer')
        // Kysely has no transaction() on a transaction; the session has, and knows that it is inside of one.
        await db.transaction().execute((inner) => add(inner, 'inner'))
      })
      const controlled = await db.startTransaction().execute()
      await add(controlled, 'controlled')
      const first = await controlled.savepoint('first').execute()
      await add(first, 'undone')
      await first.rollbackToSavepoint('first').execute()
      await controlled.commit().execute()
      return added(db)
    },
    ['outer', 'inner', 'controlled'],
  ],
  'a controlled one that is rolled back': [
    async (db) => {
      const controlled = await db.startTransaction().execute()
      await add(controlled, 'lost')
      await controlled.rollback().execute()
      await add(db, 'kept')
      return added(db)
    },
    ['kept'],
  ],
  'connection() is the session itself': [
    (db) =>
      db.connection().execute(async (connection) => {
        const pid = sql<{ pid: number }>`select pg_backend_pid() as pid`
        const [{ pid: there }] = (await pid.execute(connection)).rows as [{ pid: number }]
        const [{ pid: here }] = (await pid.execute(db)).rows as [{ pid: number }]
        return there === here
      }),
    true,
  ],
})
