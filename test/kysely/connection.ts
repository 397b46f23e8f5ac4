import { type Kysely, sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* fastify.db.kysely.connection(): one connection for all of it, with what it remembers. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

/** An app whose pool has something else to do as soon as `interfere` is called. */
async function busyApp(t: Test) {
  const app = await buildApp(t, database, { pool: { size: 2 } })
  const held = gate()
  const goOn = gate()
  let other: Promise<void> | undefined
  const interfere = async () => {
    other = app.db.session(async (db) => {
      await db.begin()
      held.open()
      await goOn.opened
    })
    await held.opened
  }
  const settle = async () => {
    goOn.open()
    await other
  }
  return { app, interfere, settle, kysely: app.db.kysely }
}

test('it is the same connection from the first statement to the last, in transactions too', async (t) => {
  const { kysely, interfere, settle } = await busyApp(t)
  const pids = await kysely.connection().execute(async (db) => {
    const pids = [await pidOf(db)]
    await interfere()
    pids.push(await pidOf(db))
    await db.transaction().execute(async (trx) => {
      pids.push(await pidOf(trx))
      for await (const { n } of trx.selectNoFrom(sql<number>`generate_series(1, 3)`.as('n')).stream(1)) t.ok(n)
      await add(trx, 'kept')
    })
    await db
      .transaction()
      .execute(async (trx) => {
        await add(trx, 'lost')
        throw new Error('no')
      })
      .catch(() => {})
    pids.push(await pidOf(db))
    return pids
  })
  t.equal(new Set(pids).size, 1, `${pids}`)
  t.strictSame(await notesIn(database), ['kept'])
  await settle()
})

test('session locks are given back on the connection that took them', async (t) => {
  const { kysely, interfere, settle } = await busyApp(t)
  const locks = () => database.query("select 1 from pg_locks where locktype = 'advisory'")
  await kysely.connection().execute(async (db) => {
    await sql`select pg_advisory_lock(7)`.execute(db)
    await interfere()
    t.equal((await locks()).length, 1)
    await sql`select pg_advisory_unlock(7)`.execute(db)
  })
  t.strictSame(await locks(), [])
  await settle()
})

test('a pool of one is enough, and the connection is back behind it', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 1 } })
  const { kysely } = app.db
  const inside = (db: Kysely<never>) => db.transaction().execute((trx) => pidOf(trx as never))
  t.ok(await kysely.connection().execute((db) => inside(db as unknown as Kysely<never>)))
  await kysely.connection().execute(async (db) => {
    t.equal(await pidOf(db), await inside(db as unknown as Kysely<never>))
  })
  t.equal(app.db.snapshot().checkedOut, 0)
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('a swallowed error is no commit, and a transaction that is left open is not given to the next one', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 1 } })
  const { kysely } = app.db
  await kysely.connection().execute(async (db) => {
    await pidOf(db)
    const spoilt = db.transaction().execute(async (trx) => {
      await add(trx, 'lost')
      await sql`select 1 / 0`.execute(trx).catch(() => {})
    })
    await t.rejects(spoilt, { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    await add(db, 'kept')
  })
  await kysely.connection().execute(async (db) => {
    await pidOf(db)
    const open = await db.startTransaction().execute()
    await add(open, 'forgotten')
  })
  await kysely.insertInto('notes').values({ note: 'next' }).execute()
  t.strictSame(await notesIn(database), ['kept', 'next'])
})

test('when it is lost, nothing goes on on another one', async (t) => {
  const app = await buildApp(t, database, { pool: { size: 2 } })
  const { kysely } = app.db
  await kysely.connection().execute(async (db) => {
    await sql`set role none`.execute(db)
    await terminate(database, await pidOf(db))
    await t.rejects(pidOf(db), { code: /FST_REQUEST_DB_(CONNECTION_LOST|COMMIT_UNKNOWN)|57P01/ })
    await t.rejects(add(db, 'never'), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  })
  t.ok(await pidOf(kysely), 'what comes after it has a connection')
  t.strictSame(await notesIn(database), [])
})
