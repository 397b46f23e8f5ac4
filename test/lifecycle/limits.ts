import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Requests that are too long, too large, or without a transaction. */
const database = await createDatabase(t, { sql: NOTES })

inBothModes(database, 'a handler that dwells longer than maxSessionMillis', async (t, commitOn) => {
  const cut = gate()
  const app = await buildApp(t, database, { commitOn, maxSessionMillis: 300, pool: { size: 1 } }, (app) => {
    app.get<{ Querystring: { uses?: string } }>('/', async (request) => {
      await add(request.db, 'x')
      await eventually(() => request.db.state === 'ended')
      cut.open()
      if (request.query.uses) await add(request.db, 'late')
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await cut.opened
  const { status, body } = await client.response()
  // Whoever swallows it, or never looks, must not be told that it was kept.
  if (commitOn === 'onSend') t.match({ status, body }, { status: 500, body: /SESSION_ENDED.*maxSessionMillis/ })
  t.match(await client.send('GET', '/?uses=1').response(), { status: 500, body: /SESSION_ENDED.*maxSessionMillis/ })
  await holds(t, database, [])
  t.match(app.db.snapshot().totals, { opened: 1, commits: 0 })
})

inBothModes(database, 'a statement that runs longer than maxSessionMillis', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, maxSessionMillis: 300, pool: { size: 1 } }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      await sql`select pg_sleep(30)`.execute(request.db)
      return 'ok'
    })
  })
  t.ok((await app.inject('/')).statusCode >= 500)
  await holds(t, database, [])
  t.match(app.db.snapshot().totals, { opened: 1, cancels: 1 })
})

inBothModes(database, 'a client that leaves in the middle of a large body', async (t, commitOn) => {
  const large = 'x'.repeat(20_000_000)
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      return large
    })
  })
  const client = await openHttp(t, app)
  client.socket.once('data', () => client.pause())
  client.send('GET', '/')
  await client.receives('HTTP/1.1 200')
  client.reset()
  await nothingIsLeft(t)
  const { commits, rollbacks } = app.db.snapshot().totals
  // In the one mode COMMIT came before the first byte; in the other Node may or may not say that the last has left.
  if (commitOn === 'onSend') t.equal(commits, 1)
  t.equal(commits + rollbacks, 1)
  await holds(t, database, commits === 1 ? ['x'] : [])
})

inBothModes(database, 'an autocommit route keeps what it did before it failed', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', { config: { db: { autocommit: true } } }, async (request) => {
      await add(request.db, 'a')
      t.equal(app.db.snapshot().checkedOut, 0, 'it has no connection between statements')
      await add(request.db, 'b')
      throw new Error('mine')
    })
  })
  t.equal((await app.inject('/')).statusCode, 500)
  await holds(t, database, ['a', 'b'])
})

inBothModes(database, 'an autocommit route whose client leaves during a statement', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', { config: { db: { autocommit: true } } }, async (request) => {
      await add(request.db, 'a')
      await sql`select pg_sleep(30)`.execute(request.db)
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await eventually(() => app.db.snapshot().holders[0]?.lastStatement?.includes('pg_sleep') ?? false)
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 2000 })
  await holds(t, database, ['a'])
})
