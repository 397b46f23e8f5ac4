import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import type { Test } from 'tap'
import type { RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import type { Database } from './database.ts'
import { noPgBouncer, type PgBouncer } from './pgbouncer.ts'
import { t, test } from './test.ts'

const missing = noPgBouncer()

/** A test that is skipped where PgBouncer is not installed. */
export function bouncerTest(name: string, body: (t: Test) => Promise<void>): void {
  if (missing === false) test(name, body)
  else t.skip(`${name} (${missing})`, () => {})
}

/** An app that goes through PgBouncer, or through what stands in front of it. */
export function buildPooledApp(
  t: Test,
  database: Database,
  bouncer: Pick<PgBouncer, 'connectionString'>,
  options: RequestDbOptions = {},
  routes: (app: FastifyInstance) => unknown = () => {},
  fastifyOptions: FastifyServerOptions = {},
): Promise<FastifyInstance> {
  const { connectionString } = bouncer
  return buildApp(t, database, { connectionString, pooler: 'transaction', ...options }, routes, fastifyOptions)
}

/** What PgBouncer says of the pool of this database: `cl_waiting`, `sv_active` and so on. */
export async function poolOf(bouncer: PgBouncer, database: Database): Promise<Record<string, unknown>> {
  const pools = await bouncer.admin('SHOW POOLS')
  return pools.find((pool) => pool.database === database.name) ?? {}
}
