import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { readEnvironment } from './environment.ts'
import { startPostgres } from './postgres.ts'
import { reasonOf } from './reason.ts'

/** Runs a demonstration on DATABASE_URL, or on a PostgreSQL of its own that is gone afterwards, after Ctrl-C too. */
export async function onPostgres(
  work: (connectionString: string, signal: AbortSignal) => Promise<void>,
): Promise<void> {
  const stopping = new AbortController()
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(name, () => stopping.abort())
  const { signal } = stopping
  try {
    const { databaseUrl } = readEnvironment(process.env)
    if (databaseUrl) await work(databaseUrl, signal)
    else await onOwnPostgres(work, signal)
  } catch (error) {
    process.exitCode = signal.aborted ? 130 : 1
    if (!signal.aborted) console.error(reasonOf(error))
  } finally {
    // The handlers would keep nothing alive, but a request that hangs might.
    setTimeout(() => process.exit(), 1000).unref()
  }
}

async function onOwnPostgres(work: (url: string, signal: AbortSignal) => Promise<void>, signal: AbortSignal) {
  const folder = await mkdtemp(join(tmpdir(), 'fastify-request-db-'))
  try {
    // Started by root, PostgreSQL runs as a user of its own, who has to get in.
    await chmod(folder, 0o755)
    console.log('Starting a PostgreSQL for the demonstration …')
    const postgres = await startPostgres({ folder })
    try {
      await work(postgres.connectionString, signal)
    } finally {
      await postgres.stop()
      await rm(postgres.place, { recursive: true, force: true })
    }
  } finally {
    await rm(folder, { recursive: true, force: true })
  }
}
