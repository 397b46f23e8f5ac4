import { inspect } from 'node:util'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { RequestDbOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { captureLog } from '../../support/captured-log.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { openHttp } from '../../support/http-client.ts'
import { add, pidOf, terminate } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* What strangers are told, and what is written down. */

const SECRET = 'parameter-4711'
const PASSWORD = 'password-0815'
const database = await createDatabase(t, { sql: NOTES })
const role = await database.role(`login password '${PASSWORD}'`)
await database.query(`grant all on notes to ${role}; grant usage on all sequences in schema public to ${role}`)

/** An app whose every word is kept: all that answers, errors and the log at the level of trace say. */
async function overheard(t: Test, options: RequestDbOptions, routes: (app: FastifyInstance) => unknown) {
  const proxy = await startProxy(t, database.connectionString)
  const url = Object.assign(new URL(proxy.connectionString), { username: role, password: PASSWORD })
  const log = captureLog('trace')
  const errors: unknown[] = []
  const all: RequestDbOptions = { connectionString: url.href, echo: true, echoPool: 'debug', ...options }
  const app = await buildApp(
    t,
    database,
    all,
    (app) => {
      app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
      return routes(app)
    },
    { logger: log.options },
  )
  const said = () => JSON.stringify(log.lines) + inspect(errors, { depth: 12 }) + JSON.stringify(errors)
  return { app, proxy, log, said, host: url.host }
}

/** Nothing of the inside: neither where the server is and who we are there, nor what others do. */
function saysNothing(t: Test, text: string, host: string): void {
  for (const word of [host, role, PASSWORD, database.name, '/hold', 'insert into', 'select ', 'node_modules']) {
    t.notOk(text.includes(word), `nothing of ${word}`)
  }
}

test('a pool that is used up', async (t) => {
  const held = gate()
  const goOn = gate()
  const pool = { size: 1, timeoutMillis: 100, maxWaiting: 1 }
  const { app, said, host } = await overheard(t, { pool, leakDetectionMillis: 50 }, (app) => {
    app.post('/hold', async ({ db }) => {
      await add(db, SECRET)
      held.open()
      await goOn.opened
      return 'held'
    })
    app.get('/ask', ({ db }) => pidOf(db))
  })
  const holder = app.inject({ method: 'POST', url: '/hold' })
  await held.opened
  const refused = await Promise.all([1, 2, 3].map(() => app.inject('/ask')))
  goOn.open()
  await holder
  t.match(refused.map(({ json }) => json().code).sort(), [
    'FST_REQUEST_DB_POOL_SATURATED',
    'FST_REQUEST_DB_POOL_SATURATED',
    'FST_REQUEST_DB_POOL_TIMEOUT',
  ])
  for (const { body, headers } of refused) saysNothing(t, body + JSON.stringify(headers), host)
  t.match(said(), /\/hold/, 'the log knows who holds it')
  for (const word of [SECRET, PASSWORD]) t.notOk(said().includes(word), `the log says nothing of ${word}`)
})

test('connections that are lost, COMMITs that are unknown, sessions that are over', async (t) => {
  const { app, proxy, said, host } = await overheard(t, {}, (app) => {
    app.post('/lost', async ({ db }) => {
      await add(db, SECRET)
      await terminate(database, await pidOf(db))
      await add(db, SECRET)
    })
    app.post('/unknown', async ({ db }) => {
      await add(db, SECRET)
      proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'reset')
      return 'written'
    })
    app.post('/swallowed', async ({ db }) => {
      await add(db, SECRET)
      await sql`select ${SECRET}::int`.execute(db).catch(() => {})
      return 'went on'
    })
  })
  const codes: string[] = []
  for (const url of ['/lost', '/unknown', '/swallowed']) {
    const { body, headers, json } = await app.inject({ method: 'POST', url })
    codes.push(json().code)
    saysNothing(t, body + JSON.stringify(headers), host)
  }
  t.strictSame(codes, [
    'FST_REQUEST_DB_CONNECTION_LOST',
    'FST_REQUEST_DB_COMMIT_UNKNOWN',
    'FST_REQUEST_DB_TRANSACTION_ABORTED',
  ])
  t.notOk(said().includes(PASSWORD))
})

test('no server, and a wrong password', async (t) => {
  const { app, proxy, said, host } = await overheard(t, {}, (app) => app.get('/ask', ({ db }) => pidOf(db)))
  await proxy.refuse()
  const refused = await app.inject('/ask')
  await proxy.accept()
  t.equal(refused.json().code, 'FST_REQUEST_DB_UNAVAILABLE')
  saysNothing(t, refused.body + JSON.stringify(refused.headers), host)
  await database.query(`alter role ${role} password 'another'`)
  t.teardown(() => database.query(`alter role ${role} password '${PASSWORD}'`))
  const wrong = await app.inject('/ask')
  t.equal(wrong.json().code, 'FST_REQUEST_DB_UNAVAILABLE')
  saysNothing(t, wrong.body + JSON.stringify(wrong.headers), host)
  t.notOk(said().includes(PASSWORD))
})

test('Server-Timing holds figures only, beside what the app itself says there', async (t) => {
  const { app } = await overheard(t, { serverTiming: true }, (app) => {
    app.get('/own/:word', async ({ db, params }, reply) => {
      reply.header('server-timing', 'render;dur=1')
      await sql`select ${(params as { word: string }).word}::text`.execute(db)
      return 'done'
    })
    app.get('/fails', { onSend: async (_request, reply) => failOnce(reply.statusCode) }, async ({ db }, reply) => {
      reply.header('server-timing', 'render;dur=1')
      await pidOf(db)
      return 'done'
    })
    app.get('/gone', async ({ db }, reply) => {
      await pidOf(db)
      return reply.code(304).send()
    })
  })
  const FIGURES = /^(?:render;dur=1, |)db-wait;dur=[\d.]+, db-hold;dur=[\d.]+, db-busy;dur=[\d.]+$/
  for (const url of ['/own/x%0d%0aset-cookie:%20a=b', '/own/%22,evil', '/gone', '/fails']) {
    const { headers } = await app.inject(url)
    t.match(headers['server-timing'], FIGURES, url)
    if (url !== '/gone') t.match(headers['server-timing'], /^render/, 'the own comes first')
    t.notOk('set-cookie' in headers)
  }
  const client = await openHttp(t, app)
  const { headers } = await client.send('GET', '/own/x').response()
  t.match(headers['server-timing'], /db-hold/)
  await eventually(() => app.db.snapshot().checkedOut === 0)
})

function failOnce(status: number): void {
  if (status === 200) throw new Error('mine')
}
