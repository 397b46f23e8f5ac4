import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import type { Test } from 'tap'
import requestDb, { type RequestDbOptions, type Session } from '../../lib/index.ts'
import type { Database } from './database.ts'
import { watchApp } from './nothing-left.ts'
import type { Standby } from './standby.ts'

declare module 'fastify' {
  interface FastifyInstance {
    replica: FastifyInstance['db']
  }
  interface FastifyRequest {
    readonly replica: Session
  }
  interface FastifyContextConfig {
    replica?: FastifyContextConfig['db']
  }
}

let apps = 0

/** An app with `db` on the primary and `replica` on its standby, ready, closed at the end of `t`. */
export async function buildReplicatedApp(
  t: Test,
  database: Database,
  standby: Standby,
  routes: (app: FastifyInstance) => unknown,
  { logger = false, ...replica }: RequestDbOptions & Pick<FastifyServerOptions, 'logger'> = {},
): Promise<FastifyInstance> {
  const app = Fastify({ logger })
  t.teardown(() => app.close())
  const application = `replicated app ${++apps} of ${process.pid}`
  const named = (url: string) => `${url}?application_name=${encodeURIComponent(application)}`
  await app.register(requestDb, { connectionString: named(database.connectionString), capacityCheck: false })
  await app.register(requestDb, {
    readOnly: true,
    capacityCheck: false,
    ...replica,
    decorator: 'replica',
    connectionString: named(replica.connectionString ?? standby.urlOf(database)),
  })
  await routes(app)
  await app.ready()
  watchApp(t, { database, application, snapshot: () => app.db.snapshot() })
  const onStandby = { ...database, backends: (name?: string) => standby.backends(database, name) }
  watchApp(t, { database: onStandby, application, snapshot: () => app.replica.snapshot() })
  return app
}
