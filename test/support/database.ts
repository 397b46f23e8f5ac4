import pg from 'pg'
import type { Test } from 'tap'
import { startPgBouncer } from './pgbouncer.ts'
import { sharedServer } from './server.ts'
import { isThroughPooler } from './through-pooler.ts'

/** A backend as pg_stat_activity shows it. */
export interface Backend {
  readonly pid: number
  readonly state: 'active' | 'idle' | 'idle in transaction' | 'idle in transaction (aborted)' | null
  readonly applicationName: string
  readonly query: string
  readonly waitEvent: string | null
}

export type Row = Record<string, unknown>

/** A database of a test file's own, and an eye on it that does not go through the plugin. */
export interface Database {
  readonly name: string
  readonly connectionString: string
  /** Runs a statement as superuser beside the app; returns its rows. */
  query<R = Row>(text: string, values?: unknown[]): Promise<R[]>
  /** What is committed in a table, in the order of its first column. */
  rows<R = Row>(table: string): Promise<R[]>
  /** Everyone connected to this database but the test's own eye; `application` narrows it down to one app. */
  backends(application?: string): Promise<Backend[]>
  /** A role that no other test has: roles are the server's, not the database's. Dropped with the database. */
  role(options?: string): Promise<string>
  /** A plain client of one's own, to hold a lock with for example. Ended with the test. */
  client(): Promise<pg.Client>
}

/** The application_name of what looks at a server for a test. */
export const EYE = 'the eye of the test'
let databases = 0

/** Creates it on the shared server, or on `server`; `sql` runs in it first. Dropped at the end of `t`. */
export async function createDatabase(
  t: Test,
  options: { sql?: string; server?: { connectionString: string } } = {},
): Promise<Database> {
  const serverUrl = options.server?.connectionString ?? (await sharedServer())
  const name = `test_${process.pid}_${++databases}_${Date.now().toString(36)}`
  const url = new URL(serverUrl)
  url.pathname = `/${name}`
  const direct = url.href

  await once(serverUrl, `create database ${name}`)
  const roles: string[] = []
  // A pool, because a server that restarts takes the connection away: the next question opens another.
  const eye = new pg.Pool({ connectionString: direct, max: 2, application_name: EYE })
  eye.on('error', () => {})
  t.teardown(async () => {
    await eye.end()
    // A server that a fault test stopped for good takes its databases along.
    await once(serverUrl, `drop database if exists ${name} with (force)`).catch(() => {})
    if (roles.length > 0) await once(serverUrl, `drop role ${roles.join(', ')}`).catch(() => {})
  })

  const { connectionString } = isThroughPooler
    ? await startPgBouncer(t, direct, { default_pool_size: 100 })
    : { connectionString: direct }
  const database: Database = {
    name,
    connectionString,
    query: async <R>(text: string, values?: unknown[]) => (await eye.query(text, values)).rows as R[],
    rows: (table) => database.query(`select * from ${table} order by 1`),
    backends: (application) => database.query<Backend>(BACKENDS, [EYE, application ?? null]),
    role: async (options = '') => {
      const role = `${name}_role_${roles.length + 1}`
      await database.query(`create role ${role} ${options}`)
      roles.push(role)
      return role
    },
    client: async () => {
      const client = new pg.Client({ connectionString: direct, application_name: EYE })
      client.on('error', () => {})
      t.teardown(() => client.end())
      await client.connect()
      return client
    },
  }
  if (options.sql) await database.query(options.sql)
  return database
}

/** `$1` is left out; `$2` is one app, or null. */
export const BACKENDS = `
  select pid, state, application_name as "applicationName", query, wait_event as "waitEvent"
  from pg_stat_activity
  where datname = current_database() and backend_type = 'client backend'
    and application_name <> $1 and ($2::text is null or application_name = $2)
  order by pid`

async function once(connectionString: string, sql: string): Promise<void> {
  const client = new pg.Client({ connectionString, application_name: EYE })
  client.on('error', () => {})
  await client.connect()
  try {
    await client.query(sql)
  } finally {
    await client.end()
  }
}
