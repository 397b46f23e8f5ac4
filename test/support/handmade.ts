import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import type { Database } from './database.ts'
import { watchApp } from './nothing-left.ts'
import type { Test } from './test.ts'

let apps = 0

/** An app in which the test itself registers the plugin, with the connection string it is given. */
export interface Handmade {
  readonly app: FastifyInstance
  readonly connectionString: string
  /** Makes it ready, and from then on watched as those of `buildApp`. `scope` is where `db` is, if not in the root. */
  ready(scope?: () => FastifyInstance): Promise<FastifyInstance>
}

/** An app to register the plugin in when, where and as often as the test likes. Closed at the end of `t`. */
export function handmade(t: Test, database: Database, options: FastifyServerOptions = {}): Handmade {
  const app = Fastify(options)
  t.teardown(() => app.close())
  const application = `handmade ${++apps} of ${process.pid}`
  const url = new URL(database.connectionString)
  url.searchParams.set('application_name', application)
  return {
    app,
    connectionString: url.href,
    async ready(scope = () => app) {
      await app.ready()
      watchApp(t, { database, application, snapshot: () => scope().db.snapshot() })
      return app
    },
  }
}
