import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { RequestDbOptions, Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/* What a session leaves on its connection beyond its transaction, and that the next one finds none of it. */

const database = await createDatabase(t, { sql: NOTES })
await database.query('create schema elsewhere')
const low = await database.role()

// Each outlives the transaction, and some even its rollback.
const LEAVINGS = [
  `set statement_timeout = '77s'`,
  'set search_path = elsewhere',
  `set app.tenant = 'acme'`,
  `set role ${low}`,
  'create temporary table left_over (n int)',
  'select pg_advisory_lock(42)',
  'listen left_over',
  'prepare left_over as select 1',
  'declare left_over cursor with hold for select 1',
]

async function leave(db: Session): Promise<void> {
  // The role may not make temporary tables.
  for (const text of [...LEAVINGS.filter((text) => !text.startsWith('set role')), `set role ${low}`]) {
    await sql.raw(text).execute(db)
  }
}

/** All of that, as a session that is new to it finds it. */
async function found(db: Session): Promise<Record<string, unknown>> {
  const { rows } = await sql<Record<string, unknown>>`
    select pg_backend_pid() as pid, current_user as role, current_setting('statement_timeout') as timeout,
      current_setting('search_path') as path, coalesce(current_setting('app.tenant', true), '') as tenant,
      (select count(*)::int from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()) as locks,
      (select count(*)::int from pg_listening_channels()) as channels,
      (select count(*)::int from pg_prepared_statements where name = 'left_over') as statements,
      (select count(*)::int from pg_cursors where name = 'left_over') as cursors,
      to_regclass('pg_temp.left_over') is not null as "tempTable"`.execute(db)
  return rows[0]!
}

const CLEAN = {
  role: 'postgres',
  timeout: '0',
  path: '"$user", public',
  tenant: '',
  locks: 0,
  channels: 0,
  statements: 0,
  cursors: 0,
  tempTable: false,
}

function appOf(t: Test, options: RequestDbOptions = {}, routes: (app: FastifyInstance) => unknown = () => {}) {
  return buildApp(t, database, { resetOnReturn: 'discard', pool: { size: 1 }, ...options }, (app) => {
    app.post('/leave', async ({ db }) => {
      await leave(db)
      return 'left'
    })
    app.post('/leave/committed', async ({ db }) => {
      await leave(db)
      await db.commit()
      return 'left'
    })
    app.get('/', ({ db }) => found(db))
    app.get('/autocommit', { config: { db: { autocommit: true } } }, ({ db }) => found(db))
    return routes(app)
  })
}

for (const preparedStatements of [false, { cacheSize: 10 }] as const) {
  const how = preparedStatements ? ' with prepared statements' : ''

  test(`one after the other, on the same connection${how}`, async (t) => {
    const app = await appOf(t, { preparedStatements })
    const first = (await app.inject('/')).json()
    for (const leaver of ['/leave', '/leave/committed']) {
      for (let round = 0; round < 6; round++) {
        t.equal((await app.inject({ method: 'POST', url: leaver })).statusCode, 200)
        t.strictSame((await app.inject('/')).json(), { ...CLEAN, pid: first.pid }, leaver)
      }
    }
    t.match(app.db.snapshot().totals, { opened: 1, invalidated: 0 })
  })

  test(`handed over behind a COMMIT, many at a time${how}`, async (t) => {
    const app = await appOf(t, { preparedStatements, pool: { size: 2 } })
    const requests = Array.from({ length: 60 }, (_, n) =>
      n % 2 === 0 ? app.inject({ method: 'POST', url: n % 4 === 0 ? '/leave' : '/leave/committed' }) : app.inject('/'),
    )
    const answers = await Promise.all(requests)
    for (const [n, { statusCode, body }] of answers.entries()) {
      t.equal(statusCode, 200, body)
      if (n % 2 === 1) t.match(JSON.parse(body), CLEAN)
    }
    const { handOvers, opened } = app.db.snapshot().totals
    t.ok(handOvers > 20, `${handOvers} were handed over`)
    t.equal(opened, 2)
  })
}

test('autocommit statements find nothing, and leave nothing', async (t) => {
  const app = await appOf(t, {}, (app) => {
    app.post('/set', { config: { db: { autocommit: true } } }, async ({ db }) => {
      await sql.raw(`set app.tenant = 'acme'`).execute(db)
      return 'set'
    })
  })
  const all = ['/leave', '/autocommit', '/set', '/autocommit', '/', '/leave', '/autocommit']
  const answers = await Promise.all(
    all.map((url) => app.inject({ method: url.startsWith('/leave') || url === '/set' ? 'POST' : 'GET', url })),
  )
  for (const [n, { statusCode, body }] of answers.entries()) {
    t.equal(statusCode, 200, body)
    if (body.startsWith('{')) t.match(JSON.parse(body), CLEAN, `${all[n]}`)
  }
})

test('a connection that nobody wants is cleaned at once: its locks are free, its LISTENs over', async (t) => {
  const app = await appOf(t)
  await app.inject({ method: 'POST', url: '/leave' })
  await eventually(async () => {
    const [row] = await database.query(`select count(*)::int as n from pg_locks where locktype = 'advisory'`)
    return (row as { n: number }).n === 0
  })
  await eventually(() => app.db.snapshot().idle === 1)
})

test('DISCARD ALL leaves in the packet of COMMIT, or of the next BEGIN: nobody waits for it', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await appOf(t, { connectionString: proxy.connectionString }, (app) => {
    app.get('/one', ({ db }) => sql`select 1`.execute(db))
  })
  await app.inject('/one')
  await eventually(() => app.db.snapshot().idle === 1)
  proxy.clear()
  await app.inject('/one')
  await eventually(() => app.db.snapshot().idle === 1)
  t.strictSame(proxy.statements(), [['BEGIN', 'select 1'], ['COMMIT'], ['DISCARD ALL']])
  proxy.clear()
  await Promise.all([app.inject('/one'), app.inject('/one')])
  await eventually(() => app.db.snapshot().idle === 1)
  t.strictSame(proxy.statements(), [
    ['BEGIN', 'select 1'],
    ['COMMIT'],
    ['DISCARD ALL', 'BEGIN', 'select 1'],
    ['COMMIT'],
    ['DISCARD ALL'],
  ])
  t.equal(app.db.snapshot().totals.handOvers, 1)
})

test('behind a COMMIT that fails, the next session finds nothing either', async (t) => {
  const app = await appOf(t, {}, (app) => {
    app.post('/fails', async ({ db }) => {
      await leave(db)
      await sql.raw('reset role').execute(db)
      db.add(db.insertInto('nowhere' as 'notes').values({ note: 'lost' }))
      return 'never'
    })
  })
  const answers = await Promise.all([
    app.inject({ method: 'POST', url: '/fails' }),
    app.inject('/'),
    app.inject({ method: 'POST', url: '/fails' }),
    app.inject('/'),
  ])
  t.strictSame(
    answers.map(({ statusCode }) => statusCode),
    [500, 200, 500, 200],
  )
  for (const { body } of [answers[1]!, answers[3]!]) t.match(JSON.parse(body), CLEAN)
})

test('where DISCARD ALL is cancelled, the next session gets another connection', async (t) => {
  const left = gate()
  const goOn = gate()
  const app = await appOf(t, {}, (app) => {
    app.post('/many', async ({ db }) => {
      await leave(db)
      await sql.raw('reset role').execute(db)
      // So many take DISCARD ALL a while.
      await sql
        .raw(
          `do $$ begin for n in 1..1500 loop execute 'create temporary table t' || n || ' (n int)'; end loop; end $$`,
        )
        .execute(db)
      left.open()
      await goOn.opened
      return 'ok'
    })
  })
  const { pid } = (await app.inject('/')).json()
  const first = app.inject({ method: 'POST', url: '/many' })
  await left.opened
  const second = app.inject('/')
  await eventually(() => app.db.snapshot().waiting === 1)
  goOn.open()
  await eventually(async () => {
    await database.query(
      `select pg_cancel_backend(pid) from pg_stat_activity where pid = $1 and state = 'active' and query = 'DISCARD ALL'`,
      [pid],
    )
    return app.db.snapshot().totals.invalidated > 0
  })
  t.equal((await first).statusCode, 200)
  const answer = (await second).json()
  t.match(answer, CLEAN)
  t.not(answer.pid, pid)
  t.match(app.db.snapshot().totals, { opened: 2, invalidated: 1 })
})

test('without it, what the README says stays behind does so', async (t) => {
  const app = await appOf(t, { resetOnReturn: 'rollback' }, (app) => {
    app.post('/thrown', async ({ db }) => {
      await leave(db)
      throw new Error('mine')
    })
  })
  await app.inject({ method: 'POST', url: '/thrown' })
  t.match((await app.inject('/')).json(), { ...CLEAN, locks: 1, statements: 1 })
  await database.query(
    'select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and datname = current_database()',
  )
  await app.inject({ method: 'POST', url: '/leave' })
  t.match((await app.inject('/')).json(), {
    role: low,
    timeout: '77s',
    path: 'elsewhere',
    tenant: 'acme',
    locks: 1,
    channels: 1,
    statements: 1,
    cursors: 1,
    tempTable: true,
  })
})
