import type { IsolationLevel } from 'kysely'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { add, notesIn } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Names and options that an app hands on to Kysely, and Kysely to us: what is written into SQL, word for word. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

async function recorded(t: Test) {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, pool: { size: 1 } })
  return { app, sent: () => proxy.statements().flat() }
}

for (const name of ['x"; drop table notes; --', 'x; drop table notes', "x'y", 'a\nb', 'COMMIT', 'request_db_1']) {
  test(`a savepoint called ${JSON.stringify(name)} goes out in quotes, each time`, async (t) => {
    const { app, sent } = await recorded(t)
    await app.db.session(async (db) => {
      const trx = await db.startTransaction().execute()
      await add(trx, 'before')
      const first = await trx.savepoint(name).execute()
      await add(first, 'undone')
      const back = await first.rollbackToSavepoint(name).execute()
      const released = await back.releaseSavepoint(name).execute()
      await released.commit().execute()
    })
    const quoted = `"${name.replaceAll('"', '""')}"`
    const named = sent().filter((text) => text.includes(quoted))
    t.strictSame(named, [`savepoint ${quoted}`, `rollback to ${quoted}`, `release ${quoted}`])
    t.notOk(sent().some((text) => text.replaceAll(quoted, '').includes('drop')))
    t.strictSame(await notesIn(database), ['before'])
  })
}

test('a savepoint whose name has a NUL, which would cut the statement short, ends nothing but its session', async (t) => {
  const { app } = await recorded(t)
  const used = app.db.session(async (db) => {
    const trx = await db.startTransaction().execute()
    await add(trx, 'lost')
    await trx.savepoint('x\0; drop table notes').execute()
  })
  await t.rejects(used)
  await app.db.session((db) => add(db, 'next'))
  t.strictSame(await notesIn(database), ['next'])
})

test('a setting with a NUL is refused, and the next session is served', async (t) => {
  const { app } = await recorded(t)
  const settings = { 'app.tenant': "x\0'; drop table notes; --" }
  await t.rejects(app.db.session({ settings }, (db) => add(db, 'lost')))
  await t.rejects(app.db.session({ settings: { 'app.tenant\0x': 'x' } }, (db) => add(db, 'lost')))
  await app.db.session((db) => add(db, 'next'))
  t.strictSame(await notesIn(database), ['next'])
})

for (const level of ['serializable; drop table notes', 'SERIALIZABLE', '__proto__', 'constructor', ['serializable']]) {
  test(`the isolation level ${JSON.stringify(level)} of a transaction is refused, and nothing of it sent`, async (t) => {
    const { app, sent } = await recorded(t)
    const hostile = level as IsolationLevel
    const write = (db: Parameters<typeof add>[0]) => add(db, 'lost')
    await t.rejects(app.db.kysely.transaction().setIsolationLevel(hostile).execute(write))
    await t.rejects(app.db.session((db) => db.transaction().setIsolationLevel(hostile).execute(write)))
    await t.rejects(app.db.session((db) => db.startTransaction().setIsolationLevel(hostile).execute()))
    t.notMatch(sent().join('\n'), /drop|serializable|proto/i)
    t.strictSame(await notesIn(database), [])
  })
}

test('an access mode is a choice of two, never a text', async (t) => {
  const { app, sent } = await recorded(t)
  const mode = 'read only; drop table notes' as 'read only'
  await app.db.kysely
    .transaction()
    .setAccessMode(mode)
    .execute((trx) => add(trx, 'written'))
    .catch(() => {})
  t.notMatch(sent().join('\n'), /drop/)
})

test('a chunk size is a number', async (t) => {
  const { app, sent } = await recorded(t)
  const read = async (size: unknown) => {
    for await (const _ of app.db.kysely
      .selectFrom('notes')
      .selectAll()
      .stream(size as number));
  }
  for (const size of ['1; drop table notes', 0, -1, 1.5, Number.NaN]) await t.rejects(read(size))
  t.notMatch(sent().join('\n'), /drop/)
})

test('schemas and columns are quoted', async (t) => {
  const { app, sent } = await recorded(t)
  const hostile = 'x"; drop table notes; --'
  await t.rejects(app.db.session((db) => db.withSchema(hostile).selectFrom('notes').selectAll().execute()))
  await t.rejects(
    app.db.session((db) =>
      db
        .selectFrom('notes')
        .select(hostile as 'note')
        .execute(),
    ),
  )
  for (const text of sent().filter((text) => text.includes('drop'))) t.match(text, '"x""; drop table notes; --"')
  t.strictSame(await notesIn(database), [])
})
