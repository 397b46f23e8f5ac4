import { sql } from 'kysely'
import type { SessionOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { add, notesIn } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* What an app hands on from its clients does not become SQL. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const HOSTILE = ["'; drop table notes; --", '"; drop table notes; --', 'a\nb', '$1', '\\', "' || pg_sleep(9) || '", '']

async function recorded(t: Test) {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool: { size: 1 } })
  const sent = () => proxy.statements().flat().join('\n')
  return { app, sent }
}

for (const value of HOSTILE) {
  test(`a setting with the value ${JSON.stringify(value)} is that value`, async (t) => {
    const { app, sent } = await recorded(t)
    const read = sql<{ value: string }>`select current_setting('app.tenant') as value`
    const { rows } = await app.db.session({ settings: { 'app.tenant': value } }, (db) => read.execute(db))
    t.strictSame(rows, [{ value }])
    if (value.length > 2) t.notOk(sent().includes(value))
  })

  test(`a setting of the name ${JSON.stringify(value)} is refused by the server as a name`, async (t) => {
    const { app, sent } = await recorded(t)
    const used = app.db.session({ settings: { [value]: 'x' } }, (db) => add(db, 'lost'))
    await t.rejects(used, { code: /42704|42602|22023|INVALID_OPTION/ })
    if (value.length > 2) t.notOk(sent().includes(value))
    t.strictSame(await notesIn(database), [])
  })

  test(`a savepoint that is called ${JSON.stringify(value)} is quoted, or refused`, async (t) => {
    const { app } = await recorded(t)
    const outcome = await app.db
      .session(async (db) => {
        const trx = await db.startTransaction().execute()
        await add(trx, 'before')
        const saved = await trx.savepoint(value).execute()
        await add(saved, 'undone')
        await saved.rollbackToSavepoint(value as never).execute()
        await saved.commit().execute()
        return 'kept'
      })
      .catch(() => 'refused')
    t.strictSame(await notesIn(database), outcome === 'kept' ? ['before'] : [])
  })
}

for (const wrong of [
  { isolationLevel: 'serializable; drop table notes' },
  { statementTimeoutMillis: '1; drop table notes' },
  { readOnly: 'false; drop table notes' },
  { deferrable: ['x'] },
  { settings: { 'app.tenant': { toString: () => 'x' } } },
]) {
  test(`a session with ${JSON.stringify(wrong)} is refused, and nothing is sent`, async (t) => {
    const { app, sent } = await recorded(t)
    const used = app.db.session(wrong as unknown as SessionOptions, (db) => add(db, 'lost'))
    await t.rejects(used, { code: 'FST_REQUEST_DB_INVALID_OPTION' })
    t.equal(sent(), '')
    t.strictSame(await notesIn(database), [])
  })
}
