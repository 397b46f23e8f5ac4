import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import type { RequestDbOptions, Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, buildPooledApp } from '../support/pooled-app.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

/** An app in front of so many server connections. */
async function through(
  t: Test,
  routes: (app: FastifyInstance) => unknown,
  options: RequestDbOptions = {},
  servers = 1,
) {
  const bouncer = await startPgBouncer(t, database.connectionString, { default_pool_size: servers })
  const app = await buildPooledApp(t, database, bouncer, options, routes)
  return { bouncer, app }
}

const setting = async (db: Session, name: string) => {
  const { rows } = await sql<{ value: string | null }>`select current_setting(${name}, true) as value`.execute(db)
  return rows[0]?.value ?? ''
}

bouncerTest('settings and time limits hold for their session and for no other', async (t) => {
  const settings = (request: { headers: Record<string, unknown> }) => ({ 'app.tenant': String(request.headers.tenant) })
  const { app } = await through(
    t,
    (app) => {
      app.get('/', ({ db }) => Promise.all([setting(db, 'app.tenant'), setting(db, 'statement_timeout')]))
      app.get('/auto', { config: { db: { autocommit: true } } }, ({ db }) => setting(db, 'app.tenant'))
      app.get('/slow', async ({ db }) => sql`select pg_sleep(30)`.execute(db))
    },
    { settings, statementTimeoutMillis: 400 },
  )
  const tenants = Array.from({ length: 12 }, (_, index) => `t${index}`)
  const answers = await Promise.all(tenants.map((tenant) => app.inject({ url: '/', headers: { tenant } })))
  t.strictSame(
    answers.map((answer) => answer.json()),
    tenants.map((tenant) => [tenant, '400ms']),
  )
  t.equal((await app.inject({ url: '/auto', headers: { tenant: 'x' } })).body, 'x')
  t.equal((await app.inject({ url: '/slow', headers: { tenant: 'x' } })).json().code, '57014')
  const direct = await app.db.session((db) => setting(db, 'app.tenant'))
  t.equal(direct, '')
})

bouncerTest('streams, COPY, temporary tables and cursors work inside of a transaction', async (t) => {
  const { app } = await through(
    t,
    (app) => {
      app.get('/stream', async ({ db }) => {
        const seen: string[] = []
        for await (const { note } of db.selectFrom('notes').select('note').orderBy('id').stream(3)) seen.push(note)
        return seen
      })
      app.get('/auto', { config: { db: { autocommit: true } } }, async ({ db }) => {
        let count = 0
        for await (const _ of db.selectFrom('notes').select('id').stream(3)) count++
        return { count }
      })
      app.post('/raw', ({ db }) =>
        db.withClient(async (client) => {
          await client.query('create temporary table heap (note text) on commit drop')
          await client.query("insert into heap select 'n' || n from generate_series(1, 10) n")
          await client.query('insert into notes (note) select note from heap')
          return {}
        }),
      )
    },
    { pool: { size: 4 } },
    2,
  )
  t.equal((await app.inject({ method: 'POST', url: '/raw' })).statusCode, 200)
  const expected = Array.from({ length: 10 }, (_, index) => `n${index + 1}`)
  const [one, other, auto] = await Promise.all(['/stream', '/stream', '/auto'].map((url) => app.inject(url)))
  t.strictSame([one?.json(), other?.json(), auto?.json()], [expected, expected, { count: 10 }])
})

bouncerTest('what is set for a login session stays on the server connection, for whoever comes next', async (t) => {
  const { app, bouncer } = await through(t, (app) => {
    app.post('/set', ({ db }) => sql`set app.tenant = 'of another'`.execute(db))
    app.post('/local', ({ db }) => sql`set local app.owner = 'of another'`.execute(db))
  })
  await app.inject({ method: 'POST', url: '/set' })
  await app.inject({ method: 'POST', url: '/local' })
  // Somebody else altogether.
  const stranger = new pg.Client({ connectionString: bouncer.connectionString })
  t.teardown(() => stranger.end())
  await stranger.connect()
  const { rows } = await stranger.query(
    "select current_setting('app.tenant', true) as set, current_setting('app.owner', true) as local",
  )
  t.strictSame(rows, [{ set: 'of another', local: '' }])
})

bouncerTest('server_reset_query_always cleans a server connection for the next client', async (t) => {
  const bouncer = await startPgBouncer(t, database.connectionString, {
    default_pool_size: 1,
    server_reset_query_always: 1,
  })
  const app = await buildPooledApp(t, database, bouncer, {}, (app) => {
    app.post('/set', ({ db }) => sql`set app.tenant = 'of another'`.execute(db))
    app.get('/', async ({ db }) => ({ tenant: await setting(db, 'app.tenant') }))
  })
  await app.inject({ method: 'POST', url: '/set' })
  t.strictSame((await app.inject('/')).json(), { tenant: '' })
})

bouncerTest('the application name is each client’s own, on one server connection after another', async (t) => {
  const bouncer = await startPgBouncer(t, database.connectionString, { default_pool_size: 1 })
  const named = (name: string) => `${bouncer.connectionString}?application_name=${name}`
  const routes = (app: FastifyInstance) =>
    app.get('/', async ({ db }) => ({ name: await setting(db, 'application_name') }))
  const apps = await Promise.all(
    ['red', 'blue'].map((name) => buildPooledApp(t, database, { connectionString: named(name) }, {}, routes)),
  )
  const names: string[] = []
  for (const app of [...apps, ...apps]) names.push((await app.inject('/')).json().name)
  t.strictSame(names, ['red', 'blue', 'red', 'blue'])
  t.equal((await database.backends()).length, 1)
})

bouncerTest('no pid of PgBouncer’s is taken for one of PostgreSQL’s: nobody is asked about them', async (t) => {
  const { app } = await through(
    t,
    (app) => {
      app.get('/slow', ({ db }) => sql`select pg_sleep(1)`.execute(db))
    },
    { pool: { size: 1, timeoutMillis: 400 }, capacityCheck: true },
    3,
  )
  const [slow, refused] = await Promise.all([app.inject('/slow'), app.inject('/slow')])
  t.strictSame([slow?.statusCode, refused?.statusCode], [200, 503])
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.equal((await database.backends()).length, 1, 'neither the probe nor the capacity check has connected')
})

bouncerTest('a transaction that is read only, serializable, deferred or nested is one', async (t) => {
  const { app } = await through(t, (app) => {
    app.get('/read', { config: { db: { readOnly: true } } }, async ({ db }) => ({
      readOnly: await setting(db, 'transaction_read_only'),
    }))
    app.get('/level', { config: { db: { isolationLevel: 'serializable' } } }, async ({ db }) => ({
      level: await setting(db, 'transaction_isolation'),
    }))
    app.post('/nested', async ({ db }) => {
      db.add(db.insertInto('notes').values({ note: 'deferred' }))
      await db
        .transaction()
        .execute(async (inner) => {
          await add(inner, 'undone')
          throw new Error('undo')
        })
        .catch(() => {})
      await add(db, 'kept')
    })
  })
  t.strictSame((await app.inject('/read')).json(), { readOnly: 'on' })
  t.strictSame((await app.inject('/level')).json(), { level: 'serializable' })
  t.equal((await app.inject({ method: 'POST', url: '/nested' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['deferred', 'kept'])
})

bouncerTest('an app that was not told of PgBouncer is told to set the option', async (t) => {
  const bouncer = await startPgBouncer(t, database.connectionString)
  const log = captureLog()
  const { connectionString } = bouncer
  const app = await buildApp(t, database, { connectionString, capacityCheck: true }, () => {}, { logger: log.options })
  await app.db.session((db) => setting(db, 'application_name'))
  await eventually(() => log.problems().length > 0)
  t.match(log.problems(), [{ level: 40, msg: /set the option pooler: 'transaction'/ }])
})
