import { Readable } from 'node:stream'
import type { ClientConfig } from 'pg'
import { Registry } from 'prom-client'
import { checkOptions, checkSessionOptions } from '../../../lib/check-options.ts'
import { checkDashboardOptions } from '../../../lib/dashboard/options.ts'
import requestDb, { type RequestDbOptions } from '../../../lib/index.ts'
import requestDbMetrics from '../../../lib/metrics.ts'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { handmade } from '../../support/handmade.ts'
import { add, notesIn, pidOf } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Every option there is, put on Object.prototype: before the app begins, and while it runs. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

const OTHERS: Record<string, unknown> = {
  size: 1,
  maxOverflow: 7,
  timeoutMillis: 1,
  maxWaiting: 0,
  recycleMillis: 1,
  prePing: false,
  idleMillis: 1,
  cacheSize: 1,
  decorator: 'other',
  commitOn: 'onResponse',
  shouldCommit: () => false,
  isolationLevel: 'serializable',
  readOnly: true,
  deferrable: true,
  autocommit: true,
  settings: () => ({ 'app.tenant': 'another' }),
  statementTimeoutMillis: 1,
  settleTimeoutMillis: 1,
  maxSessionMillis: 1,
  closeGraceMillis: 0,
  resetOnReturn: 'discard',
  preparedStatements: { cacheSize: 1 },
  plugins: [{}],
  echo: 'debug',
  echoPool: 'debug',
  echoParameters: true,
  leakDetectionMillis: 1,
  processes: 99,
  capacityCheck: false,
  serverTiming: true,
}

/** Out of sight of loops, which would stop other packages. */
function pollute(t: Test, properties: Record<string, unknown>): void {
  for (const [name, value] of Object.entries(properties)) {
    Object.defineProperty(Object.prototype, name, { value, configurable: true, writable: true })
  }
  t.teardown(() => cleanse(properties))
}

function cleanse(properties: Record<string, unknown>): void {
  for (const name of Object.keys(properties)) delete (Object.prototype as Record<string, unknown>)[name]
}

t.test('no option of the plugin, of sessions or of the page is taken from Object.prototype', async (t) => {
  const given = { connectionString: database.connectionString, pool: { prePing: {} }, preparedStatements: {} }
  const clean = checkOptions(given)
  const sessions = checkSessionOptions(clean.route, {})
  const page = checkDashboardOptions({ path: '/db' })
  const polluting = { ...OTHERS, allow: () => true, intervalMillis: 100, path: '/', connection: { host: 'evil' } }
  pollute(t, polluting)
  const polluted = [checkOptions(given), checkSessionOptions(clean.route, {}), checkDashboardOptions({ path: '/db' })]
  const lacking = t.throws(() => checkOptions({} as RequestDbOptions)) as { code?: string } | undefined
  cleanse(polluting)
  t.strictSame(polluted, [clean, sessions, page])
  t.equal(lacking?.code, 'FST_REQUEST_DB_INVALID_OPTION', 'and there is no connection either')
})

test('what comes to be on Object.prototype while the app runs changes no transaction', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async ({ db }) => void (await add(db, 'request')))
    app.get('/rows', ({ db }) => Readable.from(db.selectFrom('notes').selectAll().stream(1)).map(() => 'x'))
  })
  await app.inject({ method: 'POST', url: '/' })
  // Kysely itself takes the isolation level from there, and what it does not know it refuses.
  pollute(t, { ...OTHERS, accessMode: undefined, isolationLevel: undefined })
  proxy.clear()
  await app.inject({ method: 'POST', url: '/' })
  await app.inject('/rows')
  await app.db.session({}, (db) => add(db, 'session'))
  await app.db.kysely.transaction().execute((trx) => add(trx, 'transaction'))
  for await (const _ of app.db.kysely.selectFrom('notes').selectAll().stream(1));
  cleanse(OTHERS)
  const ofOurs = proxy.statements().flat()
  t.strictSame([...new Set(ofOurs.filter((text) => /^(begin|set|discard)/i.test(text)))], ['BEGIN'])
  t.strictSame(await notesIn(database), ['request', 'request', 'session', 'transaction'])
})

test('an isolation level on Object.prototype does not get into a BEGIN', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString })
  pollute(t, { isolationLevel: 'serializable; drop table notes; --' })
  for await (const _ of app.db.kysely.selectFrom('notes').selectAll().stream(1));
  await app.db.kysely
    .transaction()
    .execute((trx) => add(trx, 'x'))
    .catch(() => {})
  await app.db.session((db) => add(db, 'kept'))
  cleanse({ isolationLevel: '' })
  t.notMatch(proxy.statements().flat().join('\n'), /drop|serializable/i)
  t.match(await notesIn(database), ['kept'])
})

test('the options of a route are not taken from Object.prototype', async (t) => {
  const { app, connectionString, ready } = handmade(t, database)
  await app.register(requestDb, { connectionString, capacityCheck: false })
  pollute(t, { db: { autocommit: true, readOnly: true, shouldCommit: () => false } })
  app.post('/bare', async ({ db }) => void (await add(db, 'bare')))
  app.post('/own', { config: {} }, async ({ db }) => void (await add(db, 'own')))
  cleanse({ db: undefined })
  await ready()
  for (const url of ['/bare', '/own']) t.equal((await app.inject({ method: 'POST', url })).statusCode, 200)
  t.strictSame(await notesIn(database), ['bare', 'own'])
})

test('metrics are not served where Object.prototype says', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    pollute(t, { path: '/leak' })
    await app.register(requestDbMetrics, { registry: new Registry() })
    cleanse({ path: undefined })
  })
  t.equal((await app.inject('/leak')).statusCode, 404)
})

test('TLS that a connection inherits is refused: it would be left out, and the password sent in the clear', async (t) => {
  const { app, connectionString } = handmade(t, database)
  const { hostname: host, port } = new URL(connectionString)
  const connection = Object.assign(Object.create({ ssl: { ca: 'x' } }), { host, port: Number(port) }) as ClientConfig
  app.register(requestDb, { connection })
  await t.rejects(Promise.resolve(app.ready()), {
    code: 'FST_REQUEST_DB_INVALID_OPTION',
    message: /connection\.ssl.*inherits/,
  })
  t.strictSame(await database.backends(), [])
})

for (const [what, text] of [
  ['TLS', '{ "__proto__": { "ssl": { "rejectUnauthorized": false } } }'],
  ['a timeout', '{ "__proto__": { "query_timeout": 5 } }'],
] as const) {
  test(`${what} in a prototype that is written into JSON is refused: pg would take it from its copy`, async (t) => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { connection: { ...JSON.parse(text), connectionString } as ClientConfig })
    await t.rejects(Promise.resolve(app.ready()), {
      code: 'FST_REQUEST_DB_INVALID_OPTION',
      message: /connection\.__proto__/,
    })
    t.strictSame(await database.backends(), [])
  })
}

for (const [what, text] of [
  ['config.db', '{ "db": { "__proto__": { "autocommit": true } } }'],
  ['config.db.constructor', '{ "db": { "constructor": { "prototype": { "polluted": true } } } }'],
] as const) {
  test(`${what} with a prototype written into JSON is refused, and pollutes nothing`, async (t) => {
    const { app, connectionString, ready } = handmade(t, database)
    await app.register(requestDb, { connectionString, capacityCheck: false })
    const declare = () => app.get('/', { config: JSON.parse(text) }, ({ db }) => pidOf(db))
    t.throws(declare, { code: 'FST_REQUEST_DB_INVALID_OPTION' })
    t.notOk('polluted' in {} || 'autocommit' in {})
    await ready()
  })
}
