import { inspect } from 'node:util'
import type { FastifyInstance } from 'fastify'
import requestDb, { type Events, listen, type RequestDbOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { captureLog } from '../../support/captured-log.ts'
import { createDatabase } from '../../support/database.ts'
import { handmade } from '../../support/handmade.ts'
import { pidOf } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* The password, wherever somebody might look at what the plugin hands out: objects, events, errors, the log. */

const PASSWORD = 'password-0815'
const database = await createDatabase(t, { sql: NOTES })
const role = await database.role(`login password '${PASSWORD}'`)
const url = Object.assign(new URL(database.connectionString), { username: role, password: PASSWORD })
const { hostname, port, pathname } = url
const apart = { host: hostname, port: Number(port), user: role, password: PASSWORD, database: pathname.slice(1) }

/** A thing as somebody would look at it who does not know what is in it. */
const shown = (thing: unknown): string =>
  inspect(thing, { depth: 12, getters: true }) + JSON.stringify(thing) + inspect({ ...(thing as object) })

const saysNothing = (t: Test, thing: unknown, what: string) => t.notOk(shown(thing).includes(PASSWORD), what)

const NAMES: (keyof Events)[] = [
  'connect',
  'checkout',
  'checkin',
  'begin',
  'statement',
  'commit',
  'close',
  'invalidate',
]

for (const [what, options] of [
  ['a connection string', { connectionString: url.href }],
  ['connection: { password }', { connection: apart }],
  ['connection: { connectionString }', { connection: { connectionString: url.href } }],
] satisfies [string, RequestDbOptions][]) {
  test(`the pool, the session and every event keep the password of ${what} to themselves`, async (t) => {
    const log = captureLog('trace')
    const sessions: unknown[] = []
    const all = { ...options, echo: true, echoPool: 'debug' } as const
    const routes = (app: FastifyInstance) =>
      app.get('/', ({ db }) => {
        sessions.push(db)
        return pidOf(db)
      })
    const app = await buildApp(t, database, all, routes, { logger: log.options })
    const events: unknown[] = []
    const listeners = Object.fromEntries(NAMES.map((name) => [name, (event: unknown) => void events.push(event)]))
    t.teardown(listen(app.db.pool, listeners))
    t.equal((await app.inject('/')).statusCode, 200)
    saysNothing(t, app.db.pool, 'fastify.db.pool')
    saysNothing(t, app.db, 'fastify.db')
    saysNothing(t, app.db.kysely, 'fastify.db.kysely')
    saysNothing(t, app.db.snapshot(), 'the snapshot')
    saysNothing(t, sessions[0], 'request.db')
    t.ok(events.length >= 5)
    for (const event of events) saysNothing(t, event, 'an event')
    app.log.info({ event: events[0], pool: app.db.pool }, 'as an app would log it')
    t.ok(log.lines.some(({ msg }) => msg.startsWith('connection 1 opened')))
    saysNothing(t, log.lines, 'the log')
  })
}

const unusable: [string, RequestDbOptions][] = [
  ['a wrong password', { connection: { ...apart, password: `${PASSWORD}x` } }],
  ['a user who does not exist', { connection: { ...apart, user: 'nobody_here' } }],
  ['a host that has no address', { connectionString: `postgres://u:${PASSWORD}@no-such-host.invalid/db` }],
  ['a host that is none', { connectionString: `postgres://u:${PASSWORD}@ho st:x/db` }],
  ['a port that is none', { connectionString: `postgres://u:${PASSWORD}@127.0.0.1:99999/db` }],
  ['brackets that do not close', { connectionString: `postgres://u:${PASSWORD}@[::1/db` }],
  ['a percent sign', { connectionString: `postgres://u:${PASSWORD}%zz@127.0.0.1:1/db` }],
  ['a certificate that is not there', { connectionString: `postgres://u:${PASSWORD}@h/db?sslrootcert=/none/such` }],
  [
    'a password that cannot be had',
    { connection: { ...apart, password: () => Promise.reject(new Error('no vault')) } },
  ],
  ['a password that is none', { connection: { ...apart, password: (async () => [PASSWORD]) as never } }],
]

for (const [what, options] of unusable) {
  test(`${what} is UNAVAILABLE, and neither answer, error, report nor log tell the password`, async (t) => {
    const log = captureLog('trace')
    const errors: unknown[] = []
    const { app } = handmade(t, database, { logger: log.options })
    await app.register(requestDb, { ...options, echo: true, echoPool: 'debug' })
    app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
    app.get('/', ({ db }) => pidOf(db))
    const { statusCode, body, headers } = await app.inject('/')
    t.equal(statusCode, 503)
    t.notMatch(body + JSON.stringify(headers), /password|invalid|127\.0|nobody_here|none/)
    const [error] = errors as [Error & { report?: unknown }]
    t.match(error, { code: 'FST_REQUEST_DB_UNAVAILABLE', report: { open: 0 } })
    t.ok(error.cause instanceof Error)
    for (const thing of [error, error.cause, error.report, log.lines]) saysNothing(t, thing, 'nothing of it')
    app.log.error({ err: error, cause: error.cause, report: error.report }, 'as an app would log it')
    saysNothing(t, log.lines, 'the log')
    t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  })
}
