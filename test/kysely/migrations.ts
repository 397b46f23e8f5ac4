import * as kysely from 'kysely'
import { type Kysely, sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { test } from '../support/test.ts'

/* Kysely's migrator through the plugin: on a session, all or nothing, and one process at a time. */

// From 0.29 on it has a path of its own.
const path = 'Migrator' in kysely ? 'kysely' : 'kysely/migration'
const { Migrator }: { Migrator: MigratorClass } = await import(path)

interface MigratorClass {
  new (options: {
    db: Kysely<never>
    provider: ReturnType<typeof provider>
  }): {
    migrateToLatest(): Promise<Outcome>
    migrateDown(): Promise<Outcome>
  }
}
interface Outcome {
  readonly error?: unknown
  readonly results?: readonly { migrationName: string; status: string }[]
}

const provider = (broken = false) => ({
  async getMigrations() {
    return {
      '1-boats': {
        up: (db: Kysely<unknown>) => db.schema.createTable('boats').addColumn('name', 'text').execute(),
        down: (db: Kysely<unknown>) => db.schema.dropTable('boats').execute(),
      },
      '2-harbours': {
        async up(db: Kysely<unknown>) {
          await db.schema.createTable('harbours').addColumn('name', 'text').execute()
          if (broken) await sql`select 1 / 0`.execute(db)
        },
        down: (db: Kysely<unknown>) => db.schema.dropTable('harbours').execute(),
      },
    }
  },
})

const migrate = (db: Kysely<never>, broken = false) =>
  new Migrator({ db, provider: provider(broken) }).migrateToLatest().then(({ error, results }) => {
    if (error) throw error
    return results?.map(({ migrationName, status }) => `${migrationName}: ${status}`)
  })

const DONE = ['1-boats: Success', '2-harbours: Success']
const TABLES = "select tablename from pg_tables where schemaname = 'public' and tablename !~ 'kysely' order by 1"

test('migrations on a session: done once, and down again', async (t) => {
  const database = await createDatabase(t)
  const app = await buildApp(t, database)
  const run = () => app.db.session({ name: 'migrations' }, (db) => migrate(db as unknown as Kysely<never>))
  t.strictSame(await run(), DONE)
  t.strictSame(await run(), [])
  t.strictSame(await database.query(TABLES), [{ tablename: 'boats' }, { tablename: 'harbours' }])
  await app.db.session(async (db) => {
    const { error } = await new Migrator({ db: db as unknown as Kysely<never>, provider: provider() }).migrateDown()
    t.notOk(error)
  })
  t.strictSame(await database.query(TABLES), [{ tablename: 'boats' }])
})

test('one that fails undoes all of them', async (t) => {
  const database = await createDatabase(t)
  const app = await buildApp(t, database)
  await t.rejects(
    app.db.session((db) => migrate(db as unknown as Kysely<never>, true)),
    { code: '22012' },
  )
  t.strictSame(await database.query(TABLES), [])
  t.strictSame(await app.db.session((db) => migrate(db as unknown as Kysely<never>)), DONE)
})

// Kysely makes the tables it keeps its notes in before it takes its lock.
const lock = sql`select pg_advisory_xact_lock(hashtext('migrations'))`

test('several processes at once: one migrates, the others wait and find it done', async (t) => {
  const database = await createDatabase(t)
  const apps = await Promise.all([1, 2, 3].map(() => buildApp(t, database)))
  const results = await Promise.all(
    apps.map((app) =>
      app.db.session(async (db) => {
        await lock.execute(db)
        return migrate(db as unknown as Kysely<never>)
      }),
    ),
  )
  t.strictSame(results.map((done) => done?.length).sort(), [0, 0, 2])
})

test('on fastify.db.kysely too', async (t) => {
  const database = await createDatabase(t)
  const app = await buildApp(t, database)
  t.strictSame(await migrate(app.db.kysely as unknown as Kysely<never>), DONE)
  t.equal(app.db.snapshot().checkedOut, 0)
})
