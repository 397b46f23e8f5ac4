import { sql } from 'kysely'
import type { RouteDbOptions, Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { type OneRouteOptions, oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

// How a transaction begins, per plugin and per route, and that nothing of it reaches the next one on its connection.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()

interface Shown {
  isolation: string
  read_only: string
  deferrable: string
  timeout: string
  tenant: string | null
}
const show = async (db: Session): Promise<Shown> => {
  const { rows } = await sql<Shown>`
    select current_setting('transaction_isolation') as isolation,
           current_setting('transaction_read_only') as read_only,
           current_setting('transaction_deferrable') as deferrable,
           current_setting('statement_timeout') as timeout,
           nullif(current_setting('app.tenant', true), '') as tenant`.execute(db)
  return rows[0] as Shown
}
const DEFAULTS: Shown = {
  isolation: 'read committed',
  read_only: 'off',
  deferrable: 'off',
  timeout: '0',
  tenant: null,
}

t.beforeEach(() => database.query('truncate notes restart identity'))

/** POST / with the options under test, POST /plain without, on one connection. */
async function besidePlain(t: Test, options: OneRouteOptions) {
  const { app, post } = await oneRoute(t, database, show, {
    ...options,
    pool: { size: 1 },
    beside: (app) => {
      app.post('/plain', ({ db }) => show(db))
    },
  })
  return { app, post, plain: () => app.inject({ method: 'POST', url: '/plain' }) }
}

const CASES: [string, RouteDbOptions, Partial<Shown>][] = [
  ['read committed', { isolationLevel: 'read committed' }, { isolation: 'read committed' }],
  ['read uncommitted', { isolationLevel: 'read uncommitted' }, { isolation: 'read uncommitted' }],
  ['repeatable read', { isolationLevel: 'repeatable read' }, { isolation: 'repeatable read' }],
  ['serializable', { isolationLevel: 'serializable' }, { isolation: 'serializable' }],
  ['read only', { readOnly: true }, { read_only: 'on' }],
  ['read only by a function', { readOnly: () => true }, { read_only: 'on' }],
  ['not read only by a function', { readOnly: () => false }, { read_only: 'off' }],
  ['deferrable', { deferrable: true }, { deferrable: 'on' }],
  [
    'serializable read only deferrable',
    { isolationLevel: 'serializable', readOnly: true, deferrable: true },
    { isolation: 'serializable', read_only: 'on', deferrable: 'on' },
  ],
  ['a statement timeout', { statementTimeoutMillis: 1234 }, { timeout: '1234ms' }],
]

for (const [name, options, expected] of CASES) {
  test(`a route that says ${name} has it, the next request on its connection has the defaults`, async (t) => {
    const { app, post, plain } = await besidePlain(t, { route: options })
    t.strictSame((await post()).json(), { ...DEFAULTS, ...expected })
    t.strictSame((await plain()).json(), DEFAULTS)
    t.strictSame((await post()).json(), { ...DEFAULTS, ...expected })
    t.equal(app.db.snapshot().totals.opened, 1)
  })

  test(`a plugin that says ${name} has it on all routes`, async (t) => {
    const { post, plain } = await besidePlain(t, options)
    t.strictSame((await post()).json(), { ...DEFAULTS, ...expected })
    t.strictSame((await plain()).json(), { ...DEFAULTS, ...expected })
  })
}

test('a route overrides its plugin, also to say less', async (t) => {
  const { post, plain } = await besidePlain(t, {
    isolationLevel: 'serializable',
    readOnly: true,
    deferrable: true,
    statementTimeoutMillis: 500,
    route: { isolationLevel: 'read committed', readOnly: false, deferrable: false, statementTimeoutMillis: false },
  })
  t.strictSame((await post()).json(), DEFAULTS)
  t.strictSame((await plain()).json(), {
    isolation: 'serializable',
    read_only: 'on',
    deferrable: 'on',
    timeout: '500ms',
    tenant: null,
  })
})

test('what the transaction has, it has again after commit() by hand', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const first = await show(db)
      await db.commit()
      const second = await show(db)
      await db.rollback()
      return [first, second, await show(db)]
    },
    { isolationLevel: 'serializable', statementTimeoutMillis: 900, settings: () => ({ 'app.tenant': 'acme' }) },
  )
  const expected = { ...DEFAULTS, isolation: 'serializable', timeout: '900ms', tenant: 'acme' }
  t.strictSame((await post()).json(), [expected, expected, expected])
})

test('settings are those of the request, and the next one on the connection finds none of them', async (t) => {
  const { app } = await oneRoute(t, database, () => 'unused', {
    pool: { size: 1 },
    settings: ({ headers }): Record<string, string> => (headers.tenant ? { 'app.tenant': String(headers.tenant) } : {}),
    beside: (app) => {
      app.get('/', async ({ db }) => (await show(db)).tenant ?? 'nobody')
      app.get('/fails', async ({ db }) => {
        await show(db)
        throw new Error('mine')
      })
    },
  })
  const ask = async (tenant?: string, url = '/') => (await app.inject({ url, headers: tenant ? { tenant } : {} })).body
  t.equal(await ask('acme'), 'acme')
  t.equal(await ask(), 'nobody')
  t.match(await ask('acme', '/fails'), /mine/)
  t.equal(await ask(), 'nobody')
  t.equal(await ask("o'brien; drop table notes --"), "o'brien; drop table notes --")
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('settings may be numbers and booleans, and names are values too', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) =>
      (
        await sql`select current_setting('app.n') as n, current_setting('app.b') as b, current_setting('app.empty') as empty`.execute(
          db,
        )
      ).rows,
    { settings: () => ({ 'app.n': 42, 'app.b': true, 'app.empty': '' }) },
  )
  t.strictSame((await post()).json(), [{ n: '42', b: 'true', empty: '' }])
})

for (const [what, value] of [
  ['null', null],
  ['an object', {}],
  ['a Date', new Date(0)],
  ['a symbol', Symbol('x')],
] as const) {
  test(`a setting that is ${what} is refused, and nothing is sent`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => show(db), {
      settings: () => ({ 'app.tenant': value as unknown as string }),
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_INVALID_OPTION', message: /app\.tenant/ })
    t.strictSame(proxy.statements(), [])
  })
}

test('an empty record of settings sends no statement for them', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => insert(db, 'x').then(() => 'ok'), {
    settings: () => ({}),
  })
  t.equal((await post()).statusCode, 200)
  t.match(proxy.statements(), [['BEGIN', /^insert/], ['COMMIT']])
})

test('settings that a plugin gives win over nothing of the route: its statement timeout stays', async (t) => {
  const { post } = await oneRoute(t, database, show, {
    settings: () => ({ 'app.tenant': 'acme', lock_timeout: '5s' }),
    route: { statementTimeoutMillis: 800 },
  })
  t.match((await post()).json(), { tenant: 'acme', timeout: '800ms' })
})

test('a role and a tenant that are set for the transaction are gone with it', async (t) => {
  const low = await database.role()
  const who = async (db: Session) =>
    (await sql`select current_user::text as who, current_setting('app.tenant', true) as tenant`.execute(db)).rows[0]
  const { app, post } = await oneRoute(t, database, who, {
    pool: { size: 1 },
    beside: (app) => {
      app.post('/low', async ({ db }) => {
        await sql`set local role ${sql.id(low)}`.execute(db)
        await sql`select set_config('app.tenant', '1', true)`.execute(db)
        return who(db)
      })
    },
  })
  const before = (await post()).json()
  t.strictSame((await app.inject({ method: 'POST', url: '/low' })).json(), { who: low, tenant: '1' })
  const { who: after, tenant } = (await post()).json()
  t.equal(after, before.who)
  t.notOk(tenant)
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('settings hold from the first statement on, so that row level security can stand on them', async (t) => {
  const tenantApp = await database.role()
  await database.query(`
    create table documents (tenant text, body text);
    insert into documents values ('acme', 'a'), ('other', 'o');
    alter table documents enable row level security;
    create policy own on documents using (tenant = current_setting('app.tenant'));
    grant select, insert on documents to ${tenantApp}`)
  t.teardown(() => database.query('drop table documents'))
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const documents = db.withTables<{ documents: { tenant: string; body: string } }>()
      return Promise.all([
        documents.selectFrom('documents').select('body').execute(),
        documents.selectFrom('documents').select('body').execute(),
      ])
    },
    { settings: () => ({ 'app.tenant': 'acme', role: tenantApp }) },
  )
  t.strictSame((await post()).json(), [[{ body: 'a' }], [{ body: 'a' }]])
})

test('a write in a read-only route is 25006 and nothing, and the connection is reused', async (t) => {
  const { app, post } = await oneRoute(t, database, (db) => insert(db, 'x'), {
    pool: { size: 1 },
    route: { readOnly: true, isolationLevel: 'serializable' },
    beside: (app) => {
      app.post('/write', async ({ db }) => {
        await insert(db, 'kept')
        return 'ok'
      })
    },
  })
  t.match((await post()).json(), { statusCode: 500, code: '25006' })
  t.equal((await app.inject({ method: 'POST', url: '/write' })).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'kept' }])
  t.equal(app.db.snapshot().totals.opened, 1)
})

test('readOnly as a function decides for each request, and is told which', async (t) => {
  const { app } = await oneRoute(t, database, () => 'unused', {
    readOnly: ({ method }) => method === 'GET',
    beside: (app) => {
      app.route({ method: ['GET', 'PUT'], url: '/', handler: async ({ db }) => (await show(db)).read_only })
    },
  })
  t.equal((await app.inject({ method: 'GET', url: '/' })).body, 'on')
  t.equal((await app.inject({ method: 'PUT', url: '/' })).body, 'off')
})

test('a readOnly that throws fails the request, and nothing is opened', async (t) => {
  const { app, post } = await oneRoute(t, database, (db) => show(db), {
    readOnly: () => {
      throw new RangeError('cannot tell')
    },
  })
  t.match((await post()).json(), { statusCode: 500, message: 'cannot tell' })
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

test('statementTimeoutMillis stops a statement with 57014, and the connection is reused', async (t) => {
  const { app, post } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'x')
      await sql`select pg_sleep(30)`.execute(db)
    },
    { pool: { size: 1 }, statementTimeoutMillis: 100 },
  )
  t.match((await post()).json(), { statusCode: 500, code: '57014' })
  t.strictSame(await database.rows('notes'), [])
  t.match((await post()).json(), { statusCode: 500, code: '57014' })
  t.match(app.db.snapshot().totals, { opened: 1, cancels: 0 })
})

test('a statement that timed out and is swallowed does not pass for a success', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'x')
      await sql`select pg_sleep(30)`.execute(db).catch(() => {})
      return 'went on'
    },
    { statementTimeoutMillis: 100 },
  )
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await database.rows('notes'), [])
})

test('sessions outside of a request take the same options', async (t) => {
  const { app } = await oneRoute(t, database, () => 'unused', { isolationLevel: 'repeatable read' })
  t.match(await app.db.session(show), { isolation: 'repeatable read' })
  t.strictSame(
    await app.db.session(
      {
        isolationLevel: 'serializable',
        readOnly: true,
        deferrable: true,
        statementTimeoutMillis: 600,
        settings: { 'app.tenant': 'job' },
      },
      show,
    ),
    { isolation: 'serializable', read_only: 'on', deferrable: 'on', timeout: '600ms', tenant: 'job' },
  )
})

test('an option of a session that does not exist, or cannot be, is refused', async (t) => {
  const { app } = await oneRoute(t, database, () => 'unused')
  const refused = { code: 'FST_REQUEST_DB_INVALID_OPTION' }
  await t.rejects(app.db.session({ isolation: 'serializable' } as never, show), refused)
  await t.rejects(app.db.session({ isolationLevel: 'snapshot' } as never, show), refused)
  await t.rejects(app.db.session({ statementTimeoutMillis: -1 }, show), refused)
})
