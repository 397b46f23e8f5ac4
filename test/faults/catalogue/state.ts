import { type RawBuilder, sql } from 'kysely'
import type { Session } from '../../../lib/index.ts'
import { createDatabase } from '../../support/database.ts'
import { gate } from '../../support/gate.ts'
import { add, pidOf } from '../../support/notebook.ts'
import { scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* What outlives a session, and who uses one too long or twice. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, { sql: NOTES })
const low = await database.role()

const FOUND = sql<Record<string, unknown>>`
  select current_user = session_user as "isItself", current_setting('statement_timeout') as timeout,
    coalesce(current_setting('app.tenant', true), '') as tenant, to_regclass('pg_temp.leftover') is null as "noTable",
    (select count(*)::int from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()) as locks,
    (select count(*)::int from pg_listening_channels()) as channels, (select count(*)::int from pg_cursors where is_holdable) as cursors,
    (select count(*)::int from pg_prepared_statements where not from_sql or name = 'leftover') as prepared`
const NOTHING = {
  isItself: true,
  timeout: '0',
  tenant: '',
  noTable: true,
  locks: 0,
  channels: 0,
  cursors: 0,
  prepared: 0,
}

const LEAVINGS: Record<string, RawBuilder<unknown>[]> = {
  '65 SET, a temporary table, an advisory lock': [
    sql`set statement_timeout = '77s'`,
    sql`create temporary table leftover (n int)`,
    sql`select pg_advisory_lock(42)`,
  ],
  '66 a role and a tenant': [sql`select set_config('app.tenant', '1', false)`, sql`set role ${sql.id(low)}`],
  '68 LISTEN, a cursor WITH HOLD, a prepared statement': [
    sql`listen leftover`,
    sql`declare leftover cursor with hold for select 1`,
    sql`prepare leftover as select 1`,
  ],
}

for (const [title, statements] of Object.entries(LEAVINGS)) {
  for (const end of ['commits', 'rolls back'] as const) {
    scenario(database, `${title}, of a session that ${end}`, async (scene) => {
      const found: unknown[] = []
      await scene.open({
        pool: { size: 1 },
        resetOnReturn: 'discard',
        handler: async (db) => {
          for (const statement of statements) await statement.execute(db)
          if (end === 'rolls back') throw Object.assign(new Error('mine'), { code: 'MINE' })
          return 'done'
        },
        routes: (app) => {
          app.post('/next', async ({ db }) => {
            found.push((await FOUND.execute(db)).rows[0])
            return 'done'
          })
        },
      })
      const answers = [await scene.post(), await scene.post('/next')]
      scene.t.strictSame(found, [NOTHING])
      const expected = [end === 'commits' ? 200 : '500 MINE', 200]
      return { answers, expected, rows: [], connection: 'reused' }
    })
  }
}

scenario(database, '67 DISCARD ALL and named statements', async (scene) => {
  await scene.open({
    pool: { size: 1 },
    resetOnReturn: 'discard',
    preparedStatements: { cacheSize: 10 },
    handler: async (db) => {
      for (let n = 0; n < 6; n++) await add(db, 'kept')
      await db.withClient((client) => client.query({ name: 'mine', text: 'select 1' }))
      return 'done'
    },
  })
  const answers = [await scene.post(), await scene.post(), await scene.post()]
  return { answers, expected: [200, 200, 200], rows: Array(18).fill('kept'), connection: 'reused' }
})

scenario(database, '67 the raw client discards the names that it has given', async (scene) => {
  await scene.open({
    pool: { size: 1 },
    handler: async (db) => {
      await db.withClient(async (client) => {
        await client.query({ name: 'mine', text: 'select 1' })
        await client.query('deallocate all')
      })
      return 'done'
    },
  })
  const answers = [await scene.post(), await scene.post()]
  return { answers, expected: [200, 200], rows: [], connection: 'reused' }
})

scenario(database, '70 a statement that nobody awaited', async (scene) => {
  const fates: unknown[] = []
  await scene.open({
    handler: (db) => {
      void add(db, 'kept').then(
        () => fates.push('written'),
        (error) => fates.push(error.code),
      )
      return 'done'
    },
  })
  const answers = [await scene.post()]
  await new Promise(setImmediate)
  const rows = fates.includes('FST_REQUEST_DB_SESSION_ENDED') ? [] : ['kept']
  return { answers, expected: [200], rows, connection: 'reused' }
})

scenario(database, '71 the session is used after its end', async (scene) => {
  let kept: Session | undefined
  const late = gate<unknown>()
  const refused: unknown[] = []
  await scene.open({
    handler: async (db) => {
      await add(db, 'kept')
      kept = db
      return 'done'
    },
    routes: (app) => {
      app.addHook('onResponse', async ({ db, url }) => {
        if (url === '/') await add(db, 'lost').catch(late.open)
      })
    },
  })
  const answers = [await scene.post()]
  refused.push(await late.opened, await add(kept as Session, 'lost').catch((error) => error))
  scene.t.match(refused, [{ code: 'FST_REQUEST_DB_SESSION_ENDED' }, { code: 'FST_REQUEST_DB_SESSION_ENDED' }])
  return { answers, expected: [200], rows: ['kept'], connection: 'reused', totals: { checkouts: 1 } }
})

scenario(database, '72 five statements in parallel', async (scene) => {
  const pids = new Set<number>()
  await scene.open({
    handler: async (db) => {
      await add(db, 'kept')
      for (const pid of await Promise.all([1, 2, 3, 4, 5].map(() => pidOf(db)))) pids.add(pid)
      return 'done'
    },
  })
  const answers = [await scene.post()]
  scene.t.equal(pids.size, 1)
  return { answers, expected: [200], rows: ['kept'], connection: 'reused', totals: { checkouts: 1 } }
})

scenario(database, '73 two sessions in one request, and one connection', async (scene) => {
  await scene.open({
    pool: { size: 1, timeoutMillis: 300 },
    handler: async (db) => {
      await add(db, 'lost')
      await scene.app.db.session((own) => add(own, 'lost too'))
      return 'done'
    },
    routes: (app) => app.post('/one', ({ db }) => writes('kept')(db)),
  })
  const answers = [await scene.post(), await scene.post('/one')]
  return { answers, expected: ['503 POOL_TIMEOUT', 200], rows: ['kept'], connection: 'reused' }
})
