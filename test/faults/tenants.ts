import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

/*
 * Two tenants on the same connections, kept apart by row level security, under faults: no row ever crosses. The tenant
 * is a setting of the transaction, or, where connections are discarded between sessions, one of the connection.
 */

const REQUESTS = 20_000
const AT_A_TIME = 40
t.setTimeout(300_000)
const TENANTS = ['acme', 'umbrella'] as const

const database = await createDatabase(t, {
  sql: `${NOTES};
    alter table notes add column tenant text not null;
    alter table notes enable row level security;
    create policy own on notes using (tenant = current_setting('app.tenant', true));
    insert into notes (note, tenant) select tenant || n, tenant from unnest(array['acme', 'umbrella']) tenant, generate_series(1, 5) n;
    alter table notes alter column tenant set default current_setting('app.tenant')`,
})
const tenants = await database.role("login password 'tenants'")
await database.query(`grant select, insert, update, delete on notes to ${tenants}`)
const connectionString = Object.assign(new URL(database.connectionString), {
  username: tenants,
  password: 'tenants',
}).href

type Tenant = (typeof TENANTS)[number]
const readTenants = async (db: Session): Promise<string[]> => {
  const { rows } = await sql<{
    tenant: string
  }>`select distinct tenant from (select tenant from notes limit 20) first`.execute(db)
  return rows.map(({ tenant }) => tenant)
}

/** What a request does besides looking at its rows. */
const STEPS: Record<string, (db: Session) => Promise<unknown>> = {
  nothing: async () => {},
  write: (db) => db.insertInto('notes').values({ note: 'x' }).execute(),
  add: async (db) => db.add(db.insertInto('notes').values({ note: 'x' })),
  fail: (db) => sql`select 1 / 0`.execute(db),
  swallow: (db) => sql`select 1 / 0`.execute(db).catch(() => {}),
  'roll back': async (db) => db.rollback(),
  'undo a part': (db) =>
    db
      .transaction()
      .execute(async (db) => {
        await db.insertInto('notes').values({ note: 'x' }).execute()
        throw new Error('undo')
      })
      .catch(() => {}),
  'kill its backend': (db) => sql`select pg_terminate_backend(pg_backend_pid())`.execute(db),
  'try to look at the others': (db) => sql`set local app.other = 'umbrella'`.execute(db),
}
const COMMON = ['nothing', 'write', 'add', 'fail', 'swallow', 'roll back', 'undo a part', 'try to look at the others']

async function runs(t: Test, mode: 'transaction' | 'connection'): Promise<void> {
  const isPerConnection = mode === 'connection'
  const app = await buildApp(
    t,
    database,
    {
      connectionString,
      pool: { size: 4, maxOverflow: 2, timeoutMillis: 20_000 },
      ...(isPerConnection
        ? { resetOnReturn: 'discard' as const }
        : { settings: (request) => ({ 'app.tenant': String(request.headers['x-tenant']) }) }),
    },
    (app) => {
      app.get<{ Querystring: { step: string } }>('/', async ({ db, query, headers }, reply) => {
        const tenant = String(headers['x-tenant'])
        if (isPerConnection && headers['x-forgets'] === undefined) {
          await sql`select set_config('app.tenant', ${tenant}, false)`.execute(db)
        }
        const seen = await readTenants(db)
        await STEPS[query.step]?.(db)
        return reply.header('x-seen', seen.join()).send(seen)
      })
    },
  )
  let done = 0
  let answered = 0
  const crossed: string[] = []
  const ask = async (n: number) => {
    const tenant: Tenant = TENANTS[n % 2]!
    const step = n % 250 === 7 ? 'kill its backend' : COMMON[Math.floor(Math.random() * COMMON.length)]!
    // Who sets no tenant must see nothing at all, rather than what the one before has left.
    const forgets = isPerConnection && n % 10 === 3
    const leaver = n % 50 === 9 ? new AbortController() : undefined
    const headers = { 'x-tenant': tenant, ...(forgets && { 'x-forgets': 'true' }) }
    const answer = app.inject({ url: '/', query: { step }, headers, ...(leaver && { signal: leaver.signal }) })
    if (leaver) setTimeout(() => leaver.abort(), Math.random() * 5)
    const { statusCode, headers: answers } = await answer.catch(() => ({ statusCode: 0, headers: {} as never }))
    if (statusCode !== 200) return
    answered++
    const seen = String(answers['x-seen'] ?? '')
    if (seen !== (forgets ? '' : tenant)) crossed.push(`${tenant}, ${step}: ${seen}`)
  }
  const worker = async () => {
    while (done < REQUESTS) await ask(done++)
  }
  await Promise.all(Array.from({ length: AT_A_TIME }, worker))
  t.strictSame(crossed.slice(0, 5), [], 'no row has crossed')
  t.ok(answered > REQUESTS / 2, `${answered} were answered`)
  t.ok(app.db.snapshot().totals.handOvers > REQUESTS / 10, `${app.db.snapshot().totals.handOvers} hand-overs`)
  await eventually(() => app.db.snapshot().checkedOut === 0)
}

test('a tenant of the transaction', (t) => runs(t, 'transaction'))
test('a tenant of the connection, which is discarded between sessions', (t) => runs(t, 'connection'))
