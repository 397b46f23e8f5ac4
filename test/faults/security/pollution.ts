import Fastify from 'fastify'
import requestDbDashboard from '../../../lib/dashboard.ts'
import requestDb, { type RequestDbOptions, type SessionOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { handmade } from '../../support/handmade.ts'
import { add, notesIn } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Somebody else's code has put something on Object.prototype, or sends an object that would. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

/** Every object of the process has these, until the end of `t`; out of sight of loops, which would stop other packages. */
function pollute(t: Test, properties: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(properties)) {
    Object.defineProperty(Object.prototype, name, { value, configurable: true, writable: true })
  }
  t.teardown(() => {
    for (const name of Object.keys(properties)) delete (Object.prototype as Record<string, unknown>)[name]
  })
}

const POLLUTION = {
  autocommit: true,
  readOnly: true,
  commitOn: 'onResponse',
  shouldCommit: () => false,
  isolationLevel: 'serializable',
  statementTimeoutMillis: 1,
  settings: { 'app.tenant': 'polluted' },
  timeoutMillis: 0,
  maxOverflow: 50,
  echoParameters: true,
  allow: () => true,
}

test('what is on Object.prototype is no option, at register, of a route and of a session', async (t) => {
  pollute(t, POLLUTION)
  const app = await buildApp(t, database, { pool: {} }, (app) => {
    app.post('/', { config: { db: {} } }, async ({ db }) => {
      await add(db, 'request')
      return 'done'
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.strictSame(await notesIn(database), ['request'], 'committed before the answer, and not read only')
  await app.db.session({}, (db) => add(db, 'session'))
  await app.db.session((db) => add(db, 'session'))
  t.strictSame(await notesIn(database), ['request', 'session', 'session'])
  await t.rejects(
    app.db.session(async (db) => {
      await add(db, 'lost')
      throw new Error('mine')
    }),
    { message: 'mine' },
  )
  t.strictSame(await notesIn(database), ['request', 'session', 'session'], 'a transaction, not autocommit')
  t.match(app.db.snapshot(), { size: 10, maxOverflow: 0 })
})

test('what is on Object.prototype lets nobody see the page', async (t) => {
  pollute(t, { allow: () => true })
  const app = await buildApp(t, database, {}, (app) => app.register(requestDbDashboard, { path: '/db' }))
  const remote = await app.inject({ url: '/db', remoteAddress: '203.0.113.9' })
  t.equal(remote.statusCode, 403)
})

for (const [what, options] of [
  ['options', '{ "__proto__": { "pool": { "size": 1 } } }'],
  ['pool options', '{ "pool": { "__proto__": { "size": 1 } } }'],
  ['options with a constructor', '{ "constructor": { "prototype": { "polluted": true } } }'],
]) {
  test(`${what} with a prototype written into JSON are refused, and pollute nothing`, async (t) => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { ...JSON.parse(options!), connectionString } as RequestDbOptions)
    await t.rejects(Promise.resolve(app.ready()), { code: 'FST_REQUEST_DB_INVALID_OPTION' })
    t.notOk('polluted' in {})
  })
}

test('options that come from another prototype are refused, not ignored', async (t) => {
  const app = Fastify()
  t.teardown(() => app.close())
  const defaults = { connectionString: database.connectionString }
  app.register(requestDb, Object.assign(Object.create({ commitOn: 'onResponse' }), defaults) as RequestDbOptions)
  await t.rejects(Promise.resolve(app.ready()), {
    code: 'FST_REQUEST_DB_INVALID_OPTION',
    message: /commitOn.*inherits/,
  })
})

test('session options and settings with a prototype written into JSON', async (t) => {
  const app = await buildApp(t, database)
  const options = JSON.parse('{ "__proto__": { "autocommit": true } }') as SessionOptions
  await t.rejects(
    app.db.session(options, (db) => add(db, 'lost')),
    { code: 'FST_REQUEST_DB_INVALID_OPTION' },
  )
  const settings = JSON.parse('{ "__proto__": { "app.tenant": "x" } }') as Record<string, string>
  await t.rejects(
    app.db.session({ settings }, (db) => add(db, 'lost')),
    { code: 'FST_REQUEST_DB_INVALID_OPTION' },
  )
  t.strictSame(await notesIn(database), [])
})

for (const decorator of ['__proto__', 'constructor', 'hasOwnProperty', 'toString', 'raw', 'then']) {
  test(`a decorator called ${decorator} is refused, or works`, async (t) => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { connectionString, decorator })
    const outcome = await app.ready().then(
      () => 'ready',
      () => 'refused',
    )
    t.match(outcome, /ready|refused/)
    t.equal(Object.getPrototypeOf({}), Object.prototype)
    t.equal(typeof {}.hasOwnProperty, 'function')
    t.equal((await app.inject('/nowhere').catch(() => ({ statusCode: 404 }))).statusCode, 404, 'the app lives')
  })
}
