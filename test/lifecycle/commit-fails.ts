import type { FastifyInstance, FastifyReply } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { type CapturedLog, captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

/* A COMMIT that fails: told to the client where that is still possible, logged where it is not. */
const DEFERRED = `
  create table parents (id int primary key);
  create table children (parent int references parents deferrable initially deferred);`
const database = await createDatabase(t, { sql: `${NOTES};${DEFERRED}` })

// Of pino.
const ERROR = 50

type Tables = { children: { parent: number } }

function orphan(app: FastifyInstance, path = '/orphan'): void {
  app.post(path, async (request, reply) => {
    await add(request.db, 'orphan')
    await request.db.withTables<Tables>().insertInto('children').values({ parent: 1 }).execute()
    return reply
      .code(201)
      .headers({
        etag: '"1"',
        location: '/orphans/1',
        'content-location': '/orphans/1',
        'cache-control': 'max-age=60',
        expires: 'Thu, 01 Jan 2099 00:00:00 GMT',
        'last-modified': 'Thu, 01 Jan 2015 00:00:00 GMT',
        'x-mine': 'stays',
      })
      .send({ id: 1 })
  })
}

inBothModes(database, 'a deferred constraint fails at COMMIT', async (t, commitOn) => {
  const log = captureLog()
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, orphan, { logger: log.options })
  const client = await openHttp(t, app)
  const { status, headers, body } = await client.send('POST', '/orphan', { body: {} }).response()
  if (commitOn === 'onSend') {
    t.equal(status, 500)
    t.match(JSON.parse(body), { statusCode: 500, code: '23503', message: /COMMIT failed with 23503/ })
    t.notMatch(body, /children|parents|key|constraint/i, 'nothing of the table reaches the client')
    const left = Object.keys(headers).filter((name) => /etag|location|cache|expires|modified/.test(name))
    t.strictSame(left, [], 'what spoke of the answer that was to be is gone')
    t.equal(headers['x-mine'], 'stays')
  } else t.match({ status, etag: headers.etag }, { status: 201, etag: '"1"' }, 'the client had its answer')
  await holds(t, database, [])
  await eventually(() => log.lines.some(({ level }) => level === ERROR))
  const line = log.lines.find(({ level }) => level === ERROR)
  t.match(line, { reqId: 'req-1', err: { code: '23503', stack: /children_parent_fkey/ } })
  t.strictSame(
    proxy
      .statements()
      .flat()
      .filter((text) => text === 'COMMIT'),
    ['COMMIT'],
    'COMMIT is sent once',
  )
  t.match(app.db.snapshot().totals, { commits: 0, failedCommits: 1, opened: 1 })
  t.equal((await client.send('GET', '/nowhere').response()).status, 404, 'the socket lives on')
})

inBothModes(database, 'the neighbour in the queue is unharmed by a COMMIT that fails', async (t, commitOn) => {
  const holding = gate()
  const goOn = gate()
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.addHook('preHandler', async (request) => {
      if (request.url !== '/orphan') return
      await sql`select 1`.execute(request.db)
      holding.open()
      await goOn.opened
    })
    orphan(app)
    app.post('/innocent', async (request) => {
      await add(request.db, 'innocent')
      return 'ok'
    })
  })
  const failing = app.inject({ method: 'POST', url: '/orphan' })
  await holding.opened
  const innocent = app.inject({ method: 'POST', url: '/innocent' })
  await eventually(() => app.db.snapshot().waiting === 1)
  goOn.open()
  t.equal((await failing).statusCode, commitOn === 'onSend' ? 500 : 201)
  t.equal((await innocent).statusCode, 200)
  await holds(t, database, ['innocent'])
  t.equal(app.db.snapshot().totals.opened, 1)
})

inBothModes(database, 'an error handler of the app sees the error and may map it', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.setErrorHandler((error: { code: string; cause?: unknown }, _request, reply) => {
      t.type(error.cause, Error)
      return reply.code(error.code === '23503' ? 409 : 500).send('mapped')
    })
    orphan(app)
  })
  const answer = await app.inject({ method: 'POST', url: '/orphan' })
  t.equal(answer.statusCode, commitOn === 'onSend' ? 409 : 201)
  await holds(t, database, [])
})

inBothModes(database, 'an error handler that answers 200 does not bring the rows back', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.setErrorHandler((_error, _request, reply) => reply.code(200).send('handled'))
    orphan(app)
  })
  const answer = await app.inject({ method: 'POST', url: '/orphan' })
  if (commitOn === 'onSend') t.match(answer, { statusCode: 200, body: 'handled' })
  await holds(t, database, [])
})

const unreturned: Record<string, (reply: FastifyReply) => void> = {
  'and nothing returned': (reply) => void reply.send('sent'),
  'and an error thrown behind it': (reply) => {
    reply.send('sent')
    throw new Error('late')
  },
  'and an error sent behind it': (reply) => {
    reply.send('sent')
    reply.send(new Error('late'))
  },
}

for (const [what, send] of Object.entries(unreturned)) {
  inBothModes(database, `a COMMIT that fails for reply.send() ${what}`, async (t, commitOn) => {
    const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
      app.post('/', async (request, reply) => {
        await add(request.db, 'x')
        await request.db.withTables<Tables>().insertInto('children').values({ parent: 1 }).execute()
        send(reply)
      })
    })
    const client = await openHttp(t, app)
    const asks = [
      async () => (await app.inject({ method: 'POST', url: '/' })).statusCode,
      async () => (await client.send('POST', '/', { body: {} }).response()).status,
    ]
    for (const ask of asks) {
      const status = await ask()
      if (commitOn === 'onSend') t.equal(status, 500, 'never a good answer for a row that is not kept')
      await holds(t, database, [])
    }
  })
}

inBothModes(database, 'a COMMIT that fails at the end of a stream is logged', async (t, commitOn) => {
  const log = captureLog()
  const routes = (app: FastifyInstance) => {
    app.get('/', async (request) => {
      await request.db.withTables<Tables>().insertInto('children').values({ parent: 1 }).execute()
      return new Response('text').body
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, { logger: log.options })
  t.match(await app.inject('/'), { statusCode: 200, body: 'text' })
  await eventually(() => log.problems().length === 1)
  t.strictSame(await database.rows('children'), [])
})

inBothModes(database, 'a statement failed and the handler went on without it', async (t, commitOn) => {
  const log = captureLog()
  const routes = (app: FastifyInstance) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      await sql`select 1/0`.execute(request.db).catch(() => {})
      return 'fine'
    })
  }
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, routes, { logger: log.options })
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_TRANSACTION_ABORTED/ })
  await holds(t, database, [])
  await eventually(() => errors(log).length === 1)
  t.match(errors(log), ['FST_REQUEST_DB_TRANSACTION_ABORTED'])
  t.match(app.db.snapshot().totals, { failedCommits: 1, opened: 1 })
})

inBothModes(database, 'the handler committed behind our back', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      await sql`commit`.execute(request.db)
      return 'fine'
    })
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  if (commitOn === 'onSend') t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_TRANSACTION_ABORTED/ })
  t.equal((await app.inject('/nowhere')).statusCode, 404)
  await holds(t, database, ['x'])
})

inBothModes(database, 'the answer to COMMIT is lost', async (t, commitOn) => {
  const log = captureLog()
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, writes, { logger: log.options })
  proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'reset')
  const answer = await app.inject({ method: 'POST', url: '/' })
  if (commitOn === 'onSend') t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_COMMIT_UNKNOWN/ })
  await eventually(() => errors(log).length === 1)
  t.match(errors(log), ['FST_REQUEST_DB_COMMIT_UNKNOWN'])
  await holds(t, database, ['x'])
  await recovers(t, app)
})

inBothModes(database, 'COMMIT never reaches the server', async (t, commitOn) => {
  const log = captureLog()
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, writes, { logger: log.options })
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
  const answer = await app.inject({ method: 'POST', url: '/' })
  // Nobody here can know whether it arrived.
  if (commitOn === 'onSend') t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_COMMIT_UNKNOWN/ })
  await eventually(() => errors(log).length === 1)
  await holds(t, database, [])
  await recovers(t, app)
})

inBothModes(database, 'the server stays silent after COMMIT', async (t, commitOn) => {
  const log = captureLog()
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, settleTimeoutMillis: 500, pool: { size: 1 } }
  const app = await buildApp(t, database, options, writes, { logger: log.options })
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  const answer = await app.inject({ method: 'POST', url: '/' })
  if (commitOn === 'onSend') t.match(answer, { statusCode: 500, body: /FST_REQUEST_DB_COMMIT_UNKNOWN/ })
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1500 })
  await eventually(() => errors(log).length === 1)
  await holds(t, database, [])
  await recovers(t, app)
})

inBothModes(database, 'a callback of afterCommit is not called when COMMIT fails', async (t, commitOn) => {
  const called: string[] = []
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.addHook('preHandler', async (request) => {
      request.db.afterCommit(() => called.push('commit'))
      request.db.afterRollback(() => called.push('rollback'))
    })
    orphan(app)
  })
  await app.inject({ method: 'POST', url: '/orphan' })
  await eventually(() => called.length > 0)
  t.strictSame(called, ['rollback'])
  await holds(t, database, [])
})

function writes(app: FastifyInstance): void {
  app.post('/', async (request) => {
    await add(request.db, 'x')
    return 'ok'
  })
}

async function recovers(t: Test, app: FastifyInstance): Promise<void> {
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200, 'the next request gets a new connection')
}

function errors(log: CapturedLog): unknown[] {
  return log.lines.filter(({ level }) => level === ERROR).map(({ err }) => err?.code)
}
