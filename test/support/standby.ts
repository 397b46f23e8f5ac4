import { appendFile } from 'node:fs/promises'
import { join } from 'node:path'
import pg from 'pg'
import type { Test } from 'tap'
import { BACKENDS, type Backend, type Database, EYE, type Row } from './database.ts'
import { eventually } from './eventually.ts'
import { type OwnServer, serverFor } from './server.ts'

/** A hot standby that follows a primary over streaming replication. */
export interface Standby extends Omit<OwnServer, 'restart'> {
  /** The same database as the primary's `database`. */
  urlOf(database: Database): string
  /** Runs a statement in the database `postgres`, or in that of `url`, beside the app; returns its rows. */
  query<R = Row>(text: string, values?: unknown[], url?: string): Promise<R[]>
  /** Everyone connected to that database on the standby but the test's own eye. */
  backends(database: Database, application?: string): Promise<Backend[]>
  /** From here on nothing new is to be seen, although it arrives. */
  pauseReplay(): Promise<void>
  resumeReplay(): Promise<void>
  /** Resolves when all that is committed on the primary is to be seen. */
  caughtUp(): Promise<void>
  /** From its next start on: `hot_standby = off` lets nobody in. */
  set(setting: string): Promise<void>
  /** Makes it a primary of its own. */
  promote(): Promise<void>
}

const WITHIN = { withinMillis: 30_000 }

/**
 * A standby of `server`, which is stopped for a moment to be copied: so ask before anything connects to it. `flags` such
 * as `max_standby_streaming_delay=100ms`. Gone at the end of `t`.
 */
export async function standbyOf(
  t: Test,
  server: OwnServer,
  options: { flags?: readonly string[] } = {},
): Promise<Standby> {
  const copyOf = { folder: await folderOf(server), connectionString: server.connectionString }
  await server.stop()
  const { restart: _, ...standby } = await serverFor(t, { flags: options.flags ?? [], copyOf })
  await server.start()
  const folder = await folderOf(standby)

  const { connectionString } = standby
  const query = <R>(text: string, values?: unknown[], url = connectionString) => ask<R>(url, text, values)
  const is = async (text: string, values?: unknown[]) => (await query<{ yes: boolean }>(text, values))[0]?.yes === true
  const urlOf = ({ name }: Database) => Object.assign(new URL(connectionString), { pathname: `/${name}` }).href
  return {
    ...standby,
    urlOf,
    query,
    backends: (database, application) => query<Backend>(BACKENDS, [EYE, application ?? null], urlOf(database)),
    pauseReplay: async () => {
      await query('select pg_wal_replay_pause()')
      await eventually(() => is("select pg_get_wal_replay_pause_state() = 'paused' as yes"), WITHIN)
    },
    resumeReplay: async () => void (await query('select pg_wal_replay_resume()')),
    caughtUp: async () => {
      const [position] = await ask<{ lsn: string }>(server.connectionString, 'select pg_current_wal_lsn() as lsn')
      await eventually(() => is('select pg_last_wal_replay_lsn() >= $1::pg_lsn as yes', [position!.lsn]), WITHIN)
    },
    set: (setting) => appendFile(join(folder, 'postgresql.auto.conf'), `${setting}\n`),
    promote: async () => void (await query('select pg_promote()')),
  }
}

async function folderOf({ connectionString }: { connectionString: string }): Promise<string> {
  const [row] = await ask<{ data_directory: string }>(connectionString, 'show data_directory')
  return row!.data_directory
}

async function ask<R>(connectionString: string, text: string, values?: unknown[]): Promise<R[]> {
  const client = new pg.Client({ connectionString, application_name: EYE })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query(text, values)).rows as R[]
  } finally {
    await client.end()
  }
}
