import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { buildReplicatedApp } from '../support/replicated-app.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { standbyOf } from '../support/standby.ts'
import { t, test } from '../support/test.ts'

const server = await ownServer(t)
const standby = await standbyOf(t, server)
const database = await createDatabase(t, { sql: NOTES, server })
t.beforeEach(async () => {
  await database.query('delete from notes')
  await standby.caughtUp()
})

const isStandby = sql<{ yes: boolean }>`select pg_is_in_recovery() as yes`

function routes(app: FastifyInstance): void {
  app.post<{ Params: { note: string } }>('/:note', async ({ db, params }) => {
    await add(db, params.note)
  })
  app.get('/', ({ replica }) => replica.selectFrom('notes').select('note').execute())
  app.get('/pid', ({ replica }) => pidOf(replica))
  app.post('/replica', ({ replica }) => add(replica, 'never'))
}

test('what is written to the primary is read on the standby', async (t) => {
  const app = await buildReplicatedApp(t, database, standby, routes)
  t.equal((await app.inject({ method: 'POST', url: '/x' })).statusCode, 200)
  await standby.caughtUp()
  t.strictSame((await app.inject('/')).json(), [{ note: 'x' }])
  t.match(app.db.snapshot(), { totals: { checkouts: 1 } })
  t.match(app.replica.snapshot(), { totals: { checkouts: 1 } })
})

test('a write on the replica is refused with 25006, and its connection serves on', async (t) => {
  const app = await buildReplicatedApp(t, database, standby, routes, { pool: { size: 1 } })
  const before = (await app.inject('/pid')).json()
  t.match((await app.inject({ method: 'POST', url: '/replica' })).json(), { statusCode: 500, code: '25006' })
  t.equal((await app.inject('/pid')).json(), before)
  t.match(app.replica.snapshot(), { open: 1, totals: { invalidated: 0 } })
  t.strictSame(await notesIn(database), [])
})

test('a write without readOnly is refused by the standby itself, with 25006 too', async (t) => {
  const app = await buildReplicatedApp(t, database, standby, routes, { readOnly: false, pool: { size: 1 } })
  t.match((await app.inject({ method: 'POST', url: '/replica' })).json(), { statusCode: 500, code: '25006' })
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(app.replica.snapshot(), { open: 1, totals: { invalidated: 0 } })
})

test('one request has a session on each, and each ends with the request', async (t) => {
  const held: number[] = []
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    app.post('/:status', async ({ db, replica, params }, reply) => {
      await add(db, 'x')
      const { rows } = await isStandby.execute(replica)
      t.strictSame((await isStandby.execute(db)).rows, [{ yes: false }])
      held.push(app.db.snapshot().checkedOut, app.replica.snapshot().checkedOut)
      return reply.code(Number((params as { status: string }).status)).send(rows)
    })
  })
  t.strictSame((await app.inject({ method: 'POST', url: '/409' })).json(), [{ yes: true }])
  t.strictSame(await notesIn(database), [])
  t.strictSame((await app.inject({ method: 'POST', url: '/201' })).json(), [{ yes: true }])
  t.strictSame(await notesIn(database), ['x'])
  t.strictSame(held, [1, 1, 1, 1])
})

test('a write that is refused on the replica takes the write on the primary back with it', async (t) => {
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    app.post('/', async ({ db, replica }) => {
      await add(db, 'x')
      await add(replica, 'never')
    })
    app.post('/swallowed', async ({ db, replica }) => {
      await add(db, 'x')
      await add(replica, 'never').catch(() => {})
    })
  })
  t.match((await app.inject({ method: 'POST', url: '/' })).json(), { statusCode: 500, code: '25006' })
  t.strictSame(await notesIn(database), [])
  const answer = await app.inject({ method: 'POST', url: '/swallowed' })
  t.match(answer.json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
})

test('the answer does not wait for the COMMIT of the replica, only for that of the primary', async (t) => {
  const proxy = await startProxy(t, standby.urlOf(database))
  const app = await buildReplicatedApp(
    t,
    database,
    standby,
    (app) => {
      app.post('/', async ({ db, replica }) => {
        await add(db, 'x')
        return pidOf(replica)
      })
    },
    { connectionString: proxy.connectionString },
  )
  const commit = proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'hold')
  t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  await commit.sprung
  t.match(app.replica.snapshot(), { checkedOut: 1 }, 'it is still under way')
  t.strictSame(await notesIn(database), ['x'])
  commit.release()
})

test('serializable is not to be had on a standby: 0A000, without harm to anybody', async (t) => {
  const app = await buildReplicatedApp(
    t,
    database,
    standby,
    (app) => {
      routes(app)
      for (const isolationLevel of ['serializable', 'repeatable read', 'read committed'] as const)
        app.get(`/${isolationLevel.replace(' ', '-')}`, { config: { replica: { isolationLevel } } }, ({ replica }) =>
          pidOf(replica),
        )
      app.post('/both', { config: { replica: { isolationLevel: 'serializable' } } }, async ({ db, replica }) => {
        await add(db, 'x')
        await pidOf(replica)
      })
    },
    { pool: { size: 1 } },
  )
  const before = (await app.inject('/pid')).json()
  t.match((await app.inject('/serializable')).json(), {
    statusCode: 500,
    code: '0A000',
    message: 'cannot use serializable mode in a hot standby',
  })
  t.match((await app.inject({ method: 'POST', url: '/both' })).json(), { code: '0A000' })
  t.strictSame(await notesIn(database), [])
  t.equal((await app.inject('/repeatable-read')).json(), before)
  t.equal((await app.inject('/read-committed')).json(), before)
  t.match(app.replica.snapshot(), { open: 1, totals: { invalidated: 0 } })
})

test('a replica registered with serializable answers 0A000 to every read until that is changed', async (t) => {
  const options = { isolationLevel: 'serializable', deferrable: true, preparedStatements: { cacheSize: 10 } } as const
  const app = await buildReplicatedApp(t, database, standby, routes, options)
  for (let i = 0; i < 5; i++) t.match((await app.inject('/')).json(), { statusCode: 500, code: '0A000' })
  t.equal((await app.inject({ method: 'POST', url: '/x' })).statusCode, 200)
})

test('a stream of a replica is read to its end, then committed', async (t) => {
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    app.get('/', async ({ replica }, reply) => {
      const rows = replica.selectFrom('notes').select('note').stream(10)
      const lines = async function* () {
        for await (const { note } of rows) yield `${note}\n`
      }
      return reply.type('text/plain').send(Readable.from(lines()))
    })
  })
  await database.query("insert into notes (note) select 'n' || i from generate_series(1, 100) as i")
  await standby.caughtUp()
  t.equal((await app.inject('/')).body.trim().split('\n').length, 100)
})

test('a client that leaves has its statement cancelled on the standby', async (t) => {
  const begun = gate()
  const app = await buildReplicatedApp(t, database, standby, (app) => {
    app.get('/', async ({ replica }) => {
      begun.open()
      await sql`select pg_sleep(60)`.execute(replica)
    })
  })
  const client = await openHttp(t, app)
  client.send('GET', '/')
  await begun.opened
  const sleeps = async () => (await standby.backends(database)).some(({ query }) => query.includes('pg_sleep(60)'))
  await eventually(sleeps, { withinMillis: 10_000 })
  client.destroy()
  await eventually(() => app.replica.snapshot().checkedOut === 0, { withinMillis: 10_000 })
  t.strictSame(
    (await standby.backends(database)).filter(({ state }) => state === 'active'),
    [],
  )
})
