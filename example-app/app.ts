import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import requestDb, { type RequestDbOptions } from 'fastify-request-db'
import requestDbDashboard from 'fastify-request-db/dashboard'
import { loadData } from './data.ts'
import type { Mailer } from './mailer.ts'
import { airportRoutes } from './routes/airports.ts'
import { exportRoute } from './routes/export.ts'
import { answerFailure } from './routes/failures.ts'
import { tripRoutes } from './routes/trips.ts'
import { createTables } from './tables.ts'

export interface AppOptions extends Pick<RequestDbOptions, 'pool' | 'echo' | 'echoPool'> {
  connectionString: string
  mailer: Mailer
  logger?: FastifyServerOptions['logger']
}

/** The app, ready to listen or to be injected into. Its first start makes the tables and loads the airports. */
export function buildApp({ mailer, logger = false, ...database }: AppOptions): FastifyInstance {
  const app = Fastify({
    logger,
    // A first start on a slow machine takes its time.
    pluginTimeout: 60_000,
    // What is misspelt or of the wrong type is refused, rather than dropped or bent.
    ajv: { customOptions: { removeAdditional: false } },
  })
  app.setErrorHandler(answerFailure)
  app.register(requestDb, { ...database, asyncContext: true })
  // A page of what the pool is doing. Without the option `allow` it is only for this machine.
  app.register(requestDbDashboard, { path: '/db' })
  app.register(airportRoutes)
  app.register(tripRoutes, { mailer })
  app.register(exportRoute)
  app.addHook('onReady', () =>
    app.db.session(async (session) => {
      await createTables(session)
      await loadData(session)
    }),
  )
  return app
}
