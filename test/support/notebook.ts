import { type Kysely, sql } from 'kysely'
import type { DatabaseSchema } from '../../lib/index.ts'
import type { Database } from './database.ts'
import type { PostgresProxy } from './proxy.ts'

/** Writes a row into `notes`. */
export const add = (db: Kysely<DatabaseSchema>, note: string) => db.insertInto('notes').values({ note }).execute()

/** The backend behind a session. */
export async function pidOf(db: Kysely<DatabaseSchema>): Promise<number> {
  const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
  return rows[0]!.pid
}

/** The notes that are committed, in the order in which they were written. */
export async function notesIn(database: Database): Promise<string[]> {
  return (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
}

/** Resolves when the backend is gone. */
export const terminate = (database: Database, pid: number) =>
  database.query('select pg_terminate_backend($1, 5000)', [pid])

export async function isGone(database: Database, pid: number): Promise<boolean> {
  return !(await database.backends()).some((backend) => backend.pid === pid)
}

/**
 * The first word of each statement since `clear()`, flight by flight: `[['BEGIN', 'INSERT'], ['COMMIT']]`. A ping is `[]`.
 * What a report asks the server, over a connection of its own, is left out.
 */
export function verbs(proxy: PostgresProxy): string[][] {
  const sessions = proxy.statements().filter(([text]) => !text?.includes('pg_blocking_pids'))
  return sessions.map((flight) => flight.map((text) => text.split(' ')[0]!.toUpperCase()))
}
