import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { allHaveLeft } from '../support/open-sockets.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* A client that leaves while the session waits: for the server, for a connection, or for the rest of an upload. */
const database = await createDatabase(t, { sql: NOTES })

inBothModes(database, 'a long statement is cancelled and its row lock is free again', async (t, commitOn) => {
  await insert(database, 'locked')
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.route({
      method: ['GET', 'POST'],
      url: '/',
      handler: async (request) => {
        await request.db.updateTable('notes').set({ note: 'changed' }).execute()
        await sql`select pg_sleep(30)`.execute(request.db)
        return 'ok'
      },
    })
  })
  for (const method of ['GET', 'POST']) {
    const client = await openHttp(t, app)
    client.send(method, '/', method === 'POST' ? { body: {} } : {})
    await eventually(() => sleeps())
    client.destroy()
    await eventually(async () => !(await sleeps()), { withinMillis: 2000 })
    await database.query(`set lock_timeout = '1s'; update notes set note = 'locked'; reset lock_timeout`)
    await holds(t, database, ['locked'])
  }
  const { opened, cancels } = app.db.snapshot().totals
  t.match({ opened, cancels }, { opened: 1, cancels: 2 }, 'the connection lives on')

  async function sleeps(): Promise<boolean> {
    return (await database.backends()).some(({ state, query }) => state === 'active' && query.includes('pg_sleep'))
  }
})

inBothModes(database, 'a statement that waits for a lock is cancelled', async (t, commitOn) => {
  await insert(database, 'locked')
  const holder = await database.client()
  await holder.query('begin; update notes set note = note')
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'mine')
      await request.db.updateTable('notes').set({ note: 'changed' }).where('note', '=', 'locked').execute()
      return 'ok'
    })
  })
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await eventually(async () => (await database.backends()).some(({ waitEvent }) => waitEvent === 'transactionid'))
  client.reset()
  await holds(t, database, ['locked'])
  await holder.query('rollback')
})

inBothModes(database, 'a request in the queue for a connection leaves it at once', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const holding = gate()
  const goOn = gate()
  const refused = gate<string>()
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/hold', async (request) => {
      await add(request.db, 'held')
      holding.open()
      await goOn.opened
      return 'ok'
    })
    app.post('/wait', async (request) => {
      await add(request.db, 'waited').catch((error) => {
        refused.open(error.code)
        throw error
      })
      return 'ok'
    })
  })
  const holder = await openHttp(t, app)
  holder.send('POST', '/hold', { body: {} })
  await holding.opened
  const waiter = await openHttp(t, app)
  waiter.send('POST', '/wait', { body: {} })
  await eventually(() => app.db.snapshot().waiting === 1)
  waiter.destroy()
  await eventually(() => app.db.snapshot().waiting === 0, { withinMillis: 500 })
  t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  goOn.open()
  t.equal((await holder.response()).status, 200)
  await holds(t, database, ['held'])
  t.equal(app.db.snapshot().totals.checkouts, 1)
  t.equal(
    proxy
      .statements()
      .flat()
      .filter((text) => text === 'BEGIN').length,
    1,
    'no BEGIN for who had left',
  )
})

inBothModes(database, 'a connection that is being opened for who has left becomes an idle one', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  })
  const dialled = proxy.trap({ from: 'client', type: 'startup' }, 'hold')
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await dialled.sprung
  client.destroy()
  await allHaveLeft(app)
  t.match(app.db.snapshot(), { idle: 0, checkedOut: 0, waiting: 0 })
  dialled.release()
  await eventually(() => app.db.snapshot().idle === 1)
  t.match(app.db.snapshot(), { open: 1, idle: 1, checkedOut: 0, waiting: 0 })
  t.strictSame(proxy.statements(), [], 'nothing was sent on it')
  await holds(t, database, [])
})

inBothModes(database, 'a connection that is being pinged for who has left stays an idle one', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { prePing: { idleMillis: 0 } } }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  })
  await app.db.ping()
  proxy.clear()
  const pinged = proxy.trap({ from: 'server', type: 'Z' }, 'hold')
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await pinged.sprung
  client.destroy()
  await allHaveLeft(app)
  pinged.release()
  await eventually(() => app.db.snapshot().idle === 1)
  t.strictSame(proxy.statements(), [[]], 'a ping and nothing else')
  await holds(t, database, [])
})

inBothModes(database, 'once COMMIT is sent it stands, whoever leaves', async (t, commitOn) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { commitOn, connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async (request) => {
      await add(request.db, 'x')
      return 'ok'
    })
  })
  const sent = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
  const client = await openHttp(t, app)
  client.send('POST', '/', { body: {} })
  await sent.sprung
  t.strictSame(await notesIn(database), [])
  if (commitOn === 'onResponse') t.equal((await client.response()).status, 200)
  else t.equal(client.received, '', 'not a byte of the answer has left')
  client.destroy()
  await allHaveLeft(app)
  sent.release()
  await holds(t, database, ['x'])
  t.match(app.db.snapshot().totals, { commits: 1, rollbacks: 0, opened: 1 })
})

inBothModes(database, 'a client that leaves while it uploads', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.addHook('onRequest', (request) => add(request.db, 'early'))
    app.post('/', async () => 'ok')
  })
  for (const leave of ['destroy', 'reset', 'halfClose'] as const) {
    const client = await openHttp(t, app)
    client.send('POST', '/', { body: { note: 'x' }, withhold: 3 })
    await eventually(() => app.db.snapshot().holders[0]?.statements === 1)
    client[leave]()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    await holds(t, database, [])
  }
  t.equal(app.db.snapshot().totals.opened, 1)
})

inBothModes(database, 'a connection that Fastify times out', async (t, commitOn) => {
  const never = gate()
  const routes = (app: FastifyInstance) => {
    app.route({
      method: ['GET', 'POST'],
      url: '/',
      handler: async (request) => {
        await add(request.db, 'x')
        await never.opened
        return 'ok'
      },
    })
  }
  const app = await buildApp(t, database, { commitOn }, routes, { connectionTimeout: 100 })
  for (const method of ['GET', 'POST']) {
    const client = await openHttp(t, app)
    client.send(method, '/', method === 'POST' ? { body: {} } : {})
    await eventually(() => client.closed)
    await holds(t, database, [])
  }
  never.open()
})

inBothModes(database, 'a callback handler that never answers ends with its client', async (t, commitOn) => {
  const wrote = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', (request) => {
      add(request.db, 'x').then(() => wrote.open())
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await wrote.opened
  t.equal(app.db.snapshot().checkedOut, 1)
  client.destroy()
  await holds(t, database, [])
})

async function insert(db: typeof database, note: string): Promise<void> {
  await db.query('insert into notes (note) values ($1)', [note])
}
