import { buildApp } from './app.ts'
import { createDatabase } from './database.ts'
import { gate } from './gate.ts'
import { takeWarnings, watchedApps, whatIsLeft } from './nothing-left.ts'
import { NOTES } from './schema.ts'
import { t, test } from './test.ts'

const database = await createDatabase(t, { sql: NOTES })

test('a session that still holds its connection is seen, in the pool and on the server', async (t) => {
  const app = await buildApp(t, database)
  const [watched] = watchedApps()
  const queried = gate()
  const finish = gate()
  const session = app.db.session(async (db) => {
    await db.selectFrom('notes').selectAll().execute()
    queried.open()
    await finish.opened
  })
  await queried.opened
  t.match(await whatIsLeft(watched!), { snapshot: { checkedOut: 1 }, backends: [{ state: 'idle in transaction' }] })
  finish.open()
  await session
  t.equal(await whatIsLeft(watched!), undefined)
})

test('a warning of Node is seen', async (t) => {
  process.emitWarning('something is wrong')
  await new Promise(setImmediate)
  t.match(takeWarnings(), [{ message: 'something is wrong' }])
})
