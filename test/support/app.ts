import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import type { Test } from 'tap'
import requestDb, { type RequestDbOptions, type Snapshot } from '../../lib/index.ts'
import type { Database } from './database.ts'
import { watchApp } from './nothing-left.ts'
import { isThroughPooler } from './through-pooler.ts'

let apps = 0

/**
 * A Fastify app with the plugin on `database`, ready, closed at the end of `t`. The options are the plugin's; without
 * `connectionString` or `connection` they are those of `database` (give the proxy's to go through a proxy). Nothing but
 * the pool connects to the server, unless a test asks for the capacity check.
 */
export async function buildApp(
  t: Test,
  database: Database,
  options: RequestDbOptions = {},
  routes: (app: FastifyInstance) => unknown = () => {},
  fastifyOptions: FastifyServerOptions & { http2?: true } = {},
): Promise<FastifyInstance> {
  const app = Fastify(fastifyOptions as FastifyServerOptions)
  t.teardown(() => app.close())
  const pooled = isThroughPooler ? { pooler: 'transaction' as const, ...options } : options
  const { application, named } = nameBackends(pooled, database)
  await app.register(requestDb, named)
  await routes(app)
  await app.ready()
  const db = (app as unknown as Record<string, { snapshot(): Snapshot }>)[options.decorator ?? 'db']!
  watchApp(t, { database, application, snapshot: () => db.snapshot() })
  return app
}

/** Each app's backends bear its own name in pg_stat_activity, unless the test has given them one. */
function nameBackends(options: RequestDbOptions, database: Database) {
  const own = `app ${++apps} of ${process.pid}`
  if (options.connection) {
    const connection = { application_name: own, ...options.connection }
    return { application: connection.application_name ?? own, named: { capacityCheck: false, ...options, connection } }
  }
  const url = new URL(options.connectionString ?? database.connectionString)
  const application = url.searchParams.get('application_name') ?? own
  url.searchParams.set('application_name', application)
  return { application, named: { capacityCheck: false, ...options, connectionString: url.href } }
}
