import type { FastifyInstance } from 'fastify'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* Who decides on commit or rollback, and when it happens: the status, `shouldCommit`, the handler, `commitOn`. */
const database = await createDatabase(t, { sql: NOTES })

function writing(app: FastifyInstance, url: string, options: object = {}, status = 200): void {
  app.post(url, options, async (request, reply) => {
    await add(request.db, url)
    return reply.code(status).send('ok')
  })
}

inBothModes(database, 'shouldCommit of the plugin replaces the rule of the status', async (t, commitOn) => {
  const asked: string[] = []
  const shouldCommit = (request: { url: string }, reply: { statusCode: number }) => {
    asked.push(`${request.url} ${reply.statusCode}`)
    return request.url === '/bad'
  }
  const app = await buildApp(t, database, { commitOn, shouldCommit }, (app) => {
    writing(app, '/good')
    writing(app, '/bad', {}, 500)
    app.post('/throws', async (request) => {
      await add(request.db, '/throws')
      throw new Error('mine')
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/good' })).statusCode, 200)
  t.equal((await app.inject({ method: 'POST', url: '/bad' })).statusCode, 500)
  t.equal((await app.inject({ method: 'POST', url: '/throws' })).statusCode, 500)
  await holds(t, database, ['/bad'])
  t.strictSame(asked, ['/good 200', '/bad 500'], 'it is not asked about an error')
})

inBothModes(database, 'shouldCommit of a route replaces that of the plugin', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, shouldCommit: () => false }, (app) => {
    writing(app, '/never')
    writing(app, '/always', { config: { db: { shouldCommit: () => true } } }, 404)
  })
  t.equal((await app.inject({ method: 'POST', url: '/never' })).statusCode, 200)
  t.equal((await app.inject({ method: 'POST', url: '/always' })).statusCode, 404)
  await holds(t, database, ['/always'])
})

inBothModes(database, 'shouldCommit that throws rolls back', async (t, commitOn) => {
  const log = captureLog()
  const shouldCommit = () => {
    throw new Error('mine')
  }
  const app = await buildApp(t, database, { commitOn, shouldCommit }, (app) => writing(app, '/'), {
    logger: log.options,
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  if (commitOn === 'onSend') t.match(answer, { statusCode: 500, body: /mine/ })
  await holds(t, database, [])
  await eventually(() => log.lines.some(({ level, err }) => level === 50 && err?.message === 'mine'))
})

inBothModes(database, 'shouldCommit is asked about a stream at its end', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, shouldCommit: (request) => request.url === '/yes' }, (app) => {
    for (const url of ['/yes', '/no']) {
      app.get(url, async (request) => {
        await add(request.db, url)
        return new Response('text').body
      })
    }
  })
  const client = await openHttp(t, app)
  for (const url of ['/yes', '/no']) t.equal((await client.send('GET', url).response()).body, 'text')
  await holds(t, database, ['/yes'])
})

inBothModes(database, 'rollback() by hand wins over a good status', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      await request.db.rollback()
      return 'ok'
    })
    app.post('/more', async (request) => {
      await add(request.db, 'x')
      await request.db.rollback()
      await add(request.db, 'y')
      return 'ok'
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  await holds(t, database, [])
  t.equal((await app.inject({ method: 'POST', url: '/more' })).statusCode, 200)
  await holds(t, database, ['y'])
})

inBothModes(database, 'commit() by hand wins over a bad end', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'a')
      await request.db.commit()
      await add(request.db, 'b')
      throw new Error('mine')
    })
  })
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 500)
  await holds(t, database, ['a'])
})

inBothModes(database, 'config.db.commitOn of a route wins over the plugin', async (t, commitOn) => {
  const other = commitOn === 'onSend' ? 'onResponse' : 'onSend'
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    writing(app, '/plain')
    writing(app, '/other', { config: { db: { commitOn: other } } })
  })
  for (const [url, mode] of [
    ['/plain', commitOn],
    ['/other', other],
  ] as const) {
    const commit = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
    const client = await openHttp(t, app)
    client.send('POST', url, { body: {} })
    await commit.sprung
    if (mode === 'onResponse') t.equal((await client.response()).status, 200, 'the answer does not wait for COMMIT')
    else t.equal(client.received, '', 'not a byte of the answer before COMMIT')
    t.notOk((await notesIn(database)).includes(url))
    commit.release()
    if (mode === 'onSend') t.equal((await client.response()).status, 200)
    await eventually(async () => (await notesIn(database)).includes(url))
  }
  await holds(t, database, ['/plain', '/other'])
})

inBothModes(database, 'a HEAD route takes the options of its GET route', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', { config: { db: { shouldCommit: () => false } } }, async (request) => {
      await add(request.db, request.method)
      return 'ok'
    })
  })
  t.equal((await app.inject({ method: 'HEAD', url: '/' })).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
  await holds(t, database, [])
})

test('a follow-up request sees what the answer before it promised', async (t) => {
  await database.query('delete from notes')
  const app = await buildApp(t, database, { pool: { size: 4 } }, (app) => {
    app.post<{ Body: { note: string } }>('/', async (request, reply) => {
      const query = request.db.insertInto('notes').values({ note: request.body.note }).returning('id')
      return reply.code(201).send(await query.executeTakeFirstOrThrow())
    })
    app.get<{ Params: { id: number } }>('/:id', async (request, reply) => {
      const { id } = request.params
      const row = await request.db.selectFrom('notes').selectAll().where('id', '=', id).executeTakeFirst()
      return row ?? reply.code(404).send()
    })
  })
  for (let n = 0; n < 50; n++) {
    const { id } = (await app.inject({ method: 'POST', url: '/', body: { note: `${n}` } })).json()
    t.match((await app.inject(`/${id}`)).json(), { id, note: `${n}` })
  }
})
