import type { PoolOptions } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import type { Database } from './database.ts'
import { watchedApps } from './nothing-left.ts'
import { startProxy } from './proxy.ts'
import type { Test } from './test.ts'

/**
 * An app without routes behind a proxy, for its pool alone, which does not ping unless told to. However short the wait for
 * a connection is, opening one may take `connectMillis`.
 */
export async function buildPooled(t: Test, database: Database, pool: PoolOptions, { connectMillis = 10_000 } = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const connection = { connectionString: proxy.connectionString, connectionTimeoutMillis: connectMillis }
  const app = await buildApp(t, database, { connection, pool: { prePing: false, ...pool } })
  return { app, proxy, application: watchedApps().at(-1)!.application }
}
