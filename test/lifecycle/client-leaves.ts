import type { FastifyInstance, FastifyRequest } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { type HttpClient, openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { allHaveLeft } from '../support/open-sockets.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/*
 * A client that leaves, at every moment, in every way, with GET and with a POST whose body was read (Fastify calls
 * other hooks for the two, and none at all for some). The code of the app goes on and tries to write once more.
 */
const database = await createDatabase(t, { sql: NOTES })

const ways: Record<string, (client: HttpClient) => void> = {
  'closes the connection': (client) => client.destroy(),
  'resets the connection': (client) => client.reset(),
  'closes its side': (client) => client.halfClose(),
}

/** Stops the app's code at one moment until the client is gone, and then has it write. */
interface Pause {
  /** Tells the test that the moment has come, and waits until the client is gone. */
  here(): Promise<void>
  /** Tries to write and tells the test what became of it. */
  late(request: FastifyRequest): Promise<void>
}

interface Moment {
  readonly name: string
  readonly routes: (app: FastifyInstance, pause: Pause) => void
  /** Connections taken in all. */
  readonly checkouts: number
}

const moments: Moment[] = [
  {
    name: 'in an onRequest hook that has written',
    checkouts: 1,
    routes: (app, pause) => {
      app.addHook('onRequest', async (request) => {
        await add(request.db, 'early')
        await pause.here()
        await pause.late(request)
      })
      route(app, async () => 'ok')
    },
  },
  {
    name: 'in a preHandler, before the first use of the session',
    checkouts: 0,
    routes: (app, pause) => {
      app.addHook('preHandler', () => pause.here())
      route(app, async (request) => {
        await pause.late(request)
        return 'ok'
      })
    },
  },
  {
    name: 'in a preHandler that has written',
    checkouts: 1,
    routes: (app, pause) => {
      app.addHook('preHandler', async (request) => {
        await add(request.db, 'early')
        await pause.here()
      })
      route(app, async (request) => {
        await pause.late(request)
        return 'ok'
      })
    },
  },
  {
    name: 'in the handler, before the first use of the session',
    checkouts: 0,
    routes: (app, pause) =>
      route(app, async (request) => {
        await pause.here()
        await pause.late(request)
        return 'ok'
      }),
  },
  {
    name: 'in a handler that then returns a value',
    checkouts: 1,
    routes: (app, pause) =>
      route(app, async (request) => {
        await add(request.db, 'early')
        await pause.here()
        await pause.late(request)
        return 'ok'
      }),
  },
  {
    name: 'in a handler that then throws',
    checkouts: 1,
    routes: (app, pause) =>
      route(app, async (request) => {
        await add(request.db, 'early')
        await pause.here()
        await pause.late(request)
        throw new Error('mine')
      }),
  },
  {
    name: 'in a handler that then returns undefined',
    checkouts: 1,
    routes: (app, pause) =>
      route(app, async (request) => {
        await add(request.db, 'early')
        await pause.here()
        await pause.late(request)
      }),
  },
  {
    name: 'in a nested transaction',
    checkouts: 1,
    routes: (app, pause) =>
      route(app, async (request) => {
        await request.db
          .transaction()
          .execute(async (trx) => {
            await trx.insertInto('notes').values({ note: 'early' }).execute()
            await pause.here()
          })
          .catch(() => {})
        await pause.late(request)
        return 'ok'
      }),
  },
  {
    name: 'after commit() by hand, which keeps that part',
    checkouts: 1,
    routes: (app, pause) =>
      route(app, async (request) => {
        await sql`select 1`.execute(request.db)
        await request.db.commit()
        await pause.here()
        await pause.late(request)
        return 'ok'
      }),
  },
  {
    name: 'in preSerialization',
    checkouts: 1,
    routes: (app, pause) => {
      app.addHook('preSerialization', async (request, _reply, payload) => {
        await pause.here()
        await pause.late(request)
        return payload
      })
      route(app, async (request) => {
        await add(request.db, 'early')
        return { ok: true }
      })
    },
  },
  {
    name: 'in an onSend hook',
    checkouts: 1,
    routes: (app, pause) => {
      app.addHook('onSend', async (request) => {
        await pause.here()
        await pause.late(request)
      })
      route(app, async (request) => {
        await add(request.db, 'early')
        return 'ok'
      })
    },
  },
  {
    name: 'in the error handler',
    checkouts: 1,
    routes: (app, pause) => {
      app.setErrorHandler(async (_error, request, reply) => {
        await pause.here()
        await pause.late(request)
        return reply.code(200).send('handled')
      })
      route(app, async (request) => {
        await add(request.db, 'early')
        throw new Error('mine')
      })
    },
  },
]

function route(app: FastifyInstance, handler: (request: FastifyRequest) => Promise<unknown>): void {
  app.route({ method: ['GET', 'POST'], url: '/', handler })
}

for (const { name, routes, checkouts } of moments) {
  for (const [how, leave] of Object.entries(ways)) {
    inBothModes(database, `a client that ${how} ${name}`, async (t, commitOn) => {
      for (const method of ['GET', 'POST']) {
        const moment = gate()
        const left = gate()
        const late = gate<string>()
        const pause: Pause = {
          here: async () => {
            moment.open()
            await left.opened
          },
          late: (request) =>
            add(request.db, 'late').then(
              () => late.open('written'),
              (error) => late.open(error.code),
            ),
        }
        const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => routes(app, pause))
        const client = await openHttp(t, app)
        client.send(method, '/', method === 'POST' ? { body: { note: 'x' } } : {})
        await moment.opened
        leave(client)
        await allHaveLeft(app)
        await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
        left.open()
        t.equal(await late.opened, 'FST_REQUEST_DB_SESSION_ENDED', `${method}: what comes after is refused`)
        await holds(t, database, [])
        t.equal(app.db.snapshot().totals.checkouts, checkouts)
        await app.db.session((db) => add(db, 'next'))
        t.equal(app.db.snapshot().totals.opened, 1, 'the connection lives on')
        await database.query('delete from notes')
      }
    })
  }
}
