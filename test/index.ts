import Fastify, { type FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import * as entry from '../lib/index.ts'
import requestDb, { type RequestDbOptions, type Session } from '../lib/index.ts'
import { buildApp } from './support/app.ts'
import { captureLog } from './support/captured-log.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { handmade } from './support/handmade.ts'
import { openHttp } from './support/http-client.ts'
import { holds, inBothModes } from './support/modes.ts'
import { add, notesIn } from './support/notebook.ts'
import { watchApp } from './support/nothing-left.ts'
import { NOTES } from './support/schema.ts'
import { type Test, t, test } from './support/test.ts'

declare module 'fastify' {
  interface FastifyInstance {
    audit: FastifyInstance['db']
  }
  interface FastifyRequest {
    readonly audit: Session
  }
  interface FastifyContextConfig {
    audit?: FastifyContextConfig['db']
  }
}

const database = await createDatabase(t, { sql: NOTES })
const other = await createDatabase(t, { sql: NOTES })
const { connectionString } = database

test('the plugin is the default export, the named one, and what require gives', async (t) => {
  t.equal(entry.default, entry.requestDb)
  t.equal((entry as Record<string, unknown>)['module.exports'], entry.default)
  const meta = (requestDb as unknown as Record<symbol, unknown>)[Symbol.for('plugin-meta')]
  t.match(meta, { name: 'fastify-request-db', fastify: /5/ })
  t.equal((requestDb as unknown as Record<symbol, unknown>)[Symbol.for('skip-override')], true)
})

test('options that cannot be are refused at register', async (t) => {
  for (const options of [{}, { connectionString, pool: { size: 0 } }, { connectionString, poolSize: 5 }]) {
    const app = Fastify()
    t.teardown(() => app.close())
    app.register(requestDb, options as RequestDbOptions)
    await t.rejects(async () => await app.ready(), { code: 'FST_REQUEST_DB_INVALID_OPTION' })
  }
})

test('what the pool has is logged once, without a secret', async (t) => {
  const log = captureLog()
  const url = new URL(connectionString)
  const pool = { size: 16, maxOverflow: 4 }
  await buildApp(t, database, { connectionString: url.href, pool, decorator: 'audit' }, () => {}, {
    logger: log.options,
  })
  const [line, ...more] = log.lines.filter(({ msg }) => msg.startsWith('request-db'))
  t.strictSame(more, [])
  t.equal(line?.msg, 'request-db: pool "audit" of size 16 overflow 4')
  t.match(line?.requestDb, { name: 'audit', size: 16, maxOverflow: 4, timeoutMillis: 10_000, maxWaiting: 1000 })
  for (const secret of [url.password, url.hostname, database.name]) t.notMatch(JSON.stringify(line), secret)
})

test('registered twice under one name: ready() names the clash', async (t) => {
  const cases: Record<string, (app: FastifyInstance) => void> = {
    'side by side': (app) => {
      app.register(requestDb, { connectionString })
      app.register(requestDb, { connectionString })
    },
    'with the same decorator': (app) => {
      app.register(requestDb, { connectionString, decorator: 'audit' })
      app.register(requestDb, { connectionString, decorator: 'audit' })
    },
    'in parent and child': (app) => {
      app.register(requestDb, { connectionString })
      app.register(async (scope) => void scope.register(requestDb, { connectionString }))
    },
    'beside a decorator of somebody else': (app) => {
      app.decorate('db', {} as FastifyInstance['db'])
      app.register(requestDb, { connectionString })
    },
    'beside a decorator of requests': (app) => {
      app.decorateRequest('db', { getter: () => ({}) as Session })
      app.register(requestDb, { connectionString })
    },
    "under one of Fastify's own names": (app) => {
      app.register(requestDb, { connectionString, decorator: 'inject' })
    },
  }
  for (const [name, register] of Object.entries(cases)) {
    const app = Fastify()
    t.teardown(() => app.close())
    register(app)
    await t.rejects(
      async () => await app.ready(),
      { code: 'FST_REQUEST_DB_ALREADY_REGISTERED', message: /"(db|audit|inject)"/ },
      name,
    )
  }
  t.strictSame(await database.backends(), [], 'no pool was left open')
})

test('two scopes beside each other have a pool each', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const scopes: FastifyInstance[] = []
  for (const [prefix, { connectionString }] of Object.entries({ one: database, two: other })) {
    app.register(
      async (scope) => {
        await scope.register(requestDb, { connectionString })
        scopes.push(scope)
        scope.post('/', async (request) => {
          await add(request.db, prefix)
          return 'ok'
        })
      },
      { prefix },
    )
  }
  await app.ready()
  await empty()
  t.equal((await app.inject({ method: 'POST', url: '/one' })).statusCode, 200)
  t.equal((await app.inject({ method: 'POST', url: '/two' })).statusCode, 200)
  t.strictSame([await notesIn(database), await notesIn(other)], [['one'], ['two']])
  t.strictSame(
    scopes.map((scope) => scope.db.snapshot().totals.opened),
    [1, 1],
  )
  t.notOk(app.hasDecorator('db'), 'outside of them there is none')
})

inBothModes(database, 'two databases side by side', async (t, commitOn) => {
  const leaving = gate()
  const never = gate()
  const app = await twoDatabases(t, { commitOn }, (app) => {
    app.post<{ Params: { end: string } }>('/:end', async (request) => {
      await add(request.db, 'db')
      await add(request.audit, 'audit')
      if (request.params.end === 'throw') throw new Error('mine')
      if (request.params.end === 'leave') {
        leaving.open()
        await never.opened
      }
      return 'ok'
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/throw' })).statusCode, 500)
  const client = await openHttp(t, app)
  client.send('POST', '/leave', { body: {} })
  await leaving.opened
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut + app.audit.snapshot().checkedOut === 0, { withinMillis: 1000 })
  never.open()
  await holds(t, database, [])
  t.strictSame(await notesIn(other), [])

  t.equal((await app.inject({ method: 'POST', url: '/good' })).statusCode, 200)
  await holds(t, database, ['db'])
  t.strictSame(await notesIn(other), ['audit'])
  t.match([app.db.snapshot().name, app.audit.snapshot().name], ['db', 'audit'])
})

test('each database has its own options of a route', async (t) => {
  const app = await twoDatabases(t, {}, (app) => {
    const config = { db: { shouldCommit: () => false }, audit: { shouldCommit: () => true } }
    app.post('/', { config }, async (request, reply) => {
      await add(request.db, 'db')
      await add(request.audit, 'audit')
      return reply.code(404).send('ok')
    })
  })
  await app.inject({ method: 'POST', url: '/' })
  await holds(t, database, [])
  t.strictSame(await notesIn(other), ['audit'])
})

test('an error names the pool it comes from', async (t) => {
  const app = await twoDatabases(t, { pool: { size: 1, timeoutMillis: 0 } }, (app) => {
    app.get('/', async (request) => {
      await sql`select 1`.execute(request.audit)
      return app.audit.session((audit) => sql`select 1`.execute(audit))
    })
  })
  t.match((await app.inject('/')).json(), {
    code: 'FST_REQUEST_DB_POOL_TIMEOUT',
    message: /^Pool limit of size 1 overflow 0 reached, connection timed out, timeout 0.00 s \(pool "audit"\)/,
  })
})

test("a route's impossible options are refused, with the name of the route", async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(requestDb, { connectionString })
  const declare = () => app.get('/trips', { config: { db: { commitOn: 'later' as 'onSend' } } }, async () => 'ok')
  t.throws(declare, { code: 'FST_REQUEST_DB_INVALID_OPTION', message: /config\.db of GET \/trips\.?commitOn/ })
  const misspelt = () => app.get('/trips', { config: { db: { readonly: true } as object } }, async () => 'ok')
  t.throws(misspelt, { code: 'FST_REQUEST_DB_INVALID_OPTION', message: /readonly/ })
})

test('what the app hands over for a route is not changed', async (t) => {
  const config = Object.freeze({ db: Object.freeze({ readOnly: true }), mine: 1 })
  const onSend = Object.freeze([async () => {}]) as unknown as (() => Promise<void>)[]
  const options = Object.freeze({ config, onSend })
  const app = await buildApp(t, database, {}, (app) => {
    for (const url of ['/a', '/b']) {
      app.get(url, options, async (request) => ({
        mine: (request.routeOptions.config as { mine?: number }).mine,
        readOnly: (await sql<{ on: string }>`select current_setting('transaction_read_only') as on`.execute(request.db))
          .rows[0]?.on,
      }))
    }
  })
  t.match((await app.inject('/a')).json(), { mine: 1, readOnly: 'on' })
  t.match((await app.inject('/b')).json(), { mine: 1, readOnly: 'on' })
  t.equal(onSend.length, 1)
})

test('request.db is one session, from the first look to the last, and cannot be replaced', async (t) => {
  await empty()
  const app = await buildApp(t, database, {}, (app) => {
    app.get('/', async (request) => {
      const { db } = request
      await add(db, 'x')
      t.throws(() => Object.assign(request, { db: null }))
      return { same: request.db === db, state: db.state }
    })
  })
  t.match((await app.inject('/')).json(), { same: true, state: 'begun' })
  await holds(t, database, ['x'])
})

async function empty(): Promise<void> {
  for (const one of [database, other]) await one.query('delete from notes')
}

async function twoDatabases(
  t: Test,
  options: RequestDbOptions,
  routes: (app: FastifyInstance) => void,
): Promise<FastifyInstance> {
  await empty()
  const { app, connectionString, ready } = handmade(t, database)
  await app.register(requestDb, { ...options, connectionString })
  const url = new URL(other.connectionString)
  url.searchParams.set('application_name', 'the audit')
  await app.register(requestDb, { ...options, connectionString: url.href, decorator: 'audit' })
  routes(app)
  watchApp(t, { database: other, application: 'the audit', snapshot: () => app.audit.snapshot() })
  return ready()
}
