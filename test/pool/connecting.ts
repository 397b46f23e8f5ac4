import { once } from 'node:events'
import { type AddressInfo, createServer, type LookupFunction, Socket } from 'node:net'
import { setImmediate as turn } from 'node:timers/promises'
import { inspect } from 'node:util'
import pg from 'pg'
import type { RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const UNAVAILABLE = { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE', error: 'Service Unavailable' }
const NOTHING = { open: 0, idle: 0, checkedOut: 0, waiting: 0, waiters: [], holders: [] }

/** `GET /` asks, `POST /` writes; errors and log lines are kept for a look. */
async function setUp(t: Test, options: RequestDbOptions) {
  const errors: Error[] = []
  const log: string[] = []
  const app = await buildApp(
    t,
    database,
    options,
    (app) => {
      app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
      app.get('/', ({ db }) => pidOf(db))
      app.get('/none', async () => 'no database')
    },
    { logger: { stream: { write: (line: string) => log.push(line) } } },
  )
  return { app, errors, log }
}

/** Something on a port that is no PostgreSQL. */
async function serve(t: Test, onConnection: (socket: Socket) => void): Promise<number> {
  const server = createServer((socket) => onConnection(socket.on('error', () => {})))
  t.teardown(() => server.close())
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return (server.address() as AddressInfo).port
}

test('the app starts, and answers what needs no database, while there is none', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  await proxy.refuse()
  const { app } = await setUp(t, { connectionString: proxy.connectionString })
  t.equal((await app.inject('/none')).statusCode, 200)
  t.equal((await app.inject('/404')).statusCode, 404)
  t.match(app.db.snapshot(), { ...NOTHING, totals: { failedConnects: 0 } })
})

test('refused connections give their slots back, and all of the pool is there once the server is', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  await proxy.refuse()
  const three = gate()
  let inside = 0
  const options = { connectionString: proxy.connectionString, pool: { size: 2, maxOverflow: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', ({ db }) => pidOf(db))
    app.get('/all', async ({ db }) => {
      await pidOf(db)
      if (++inside === 3) three.open()
      await three.opened
    })
  })
  const answers = await Promise.all(Array.from({ length: 10 }, () => app.inject('/')))
  for (const answer of answers) t.match(answer.json(), UNAVAILABLE)
  t.match(app.db.snapshot(), { ...NOTHING, totals: { failedConnects: 10, checkouts: 0, timeouts: 0 } })
  await proxy.accept()
  for (const answer of await Promise.all([1, 2, 3].map(() => app.inject('/all')))) t.equal(answer.statusCode, 200)
  await eventually(() => app.db.snapshot().open === 2)
  t.match(app.db.snapshot(), { idle: 2 })
})

test('a connect that hangs keeps nobody else waiting, and ends on time', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { app } = await setUp(t, {
    connectionString: proxy.connectionString,
    pool: { size: 2, timeoutMillis: 600 },
  })
  proxy.silenceStartup(1)
  const since = performance.now()
  const hanging = app.inject('/').then((answer) => ({ answer, after: performance.now() - since }))
  await eventually(() => proxy.recordings.length === 1)
  for (let i = 0; i < 20; i++) t.equal((await app.inject('/')).statusCode, 200)
  const { answer, after } = await hanging
  t.match(answer.json(), UNAVAILABLE)
  t.ok(after > 590 && after < 1500, `after ${after} ms`)
  await eventually(() => proxy.recordings[0]?.closed === true)
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { failedConnects: 1, timeouts: 0 } })
})

test('a server that accepts and says nothing is UNAVAILABLE after connection.connectionTimeoutMillis', async (t) => {
  const sockets = new Set<Socket>()
  const port = await serve(t, (socket) => void sockets.add(socket.resume()))
  const { app, errors } = await setUp(t, {
    connection: { host: '127.0.0.1', port, user: 'u', password: 'p', database: 'd', connectionTimeoutMillis: 250 },
  })
  const since = performance.now()
  t.match((await app.inject('/')).json(), UNAVAILABLE)
  const after = performance.now() - since
  t.ok(after > 240 && after < 1500, `after ${after} ms`)
  t.match(errors[0]?.cause, { message: /timeout/ })
  await eventually(() => [...sockets].every((socket) => socket.readableEnded || socket.destroyed))
  t.match(app.db.snapshot(), NOTHING)
})

test('an app that computes while a connection is opened does not find the server dead', async (t) => {
  const { app } = await setUp(t, { connectionString: database.connectionString, pool: { timeoutMillis: 60 } })
  const answer = app.inject('/')
  for (let turns = 0; turns < 100 && app.db.snapshot().waiters.length === 0; turns++) await turn()
  for (const until = performance.now() + 200; performance.now() < until; );
  t.equal((await answer).statusCode, 200)
  t.match(app.db.snapshot().totals, { opened: 1, failedConnects: 0 })
})

test('a server that hangs up at once is UNAVAILABLE', async (t) => {
  const port = await serve(t, (socket) => void socket.end())
  const { app } = await setUp(t, { connection: { host: '127.0.0.1', port, user: 'u', password: 'p', database: 'd' } })
  t.match((await app.inject('/')).json(), UNAVAILABLE)
  t.match(app.db.snapshot(), NOTHING)
})

test('refused on every address of a host: the error says so, although that of Node has no text', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  await proxy.refuse()
  const connection = { host: 'localhost', port: proxy.port, user: 'u', password: 'p', database: 'd' }
  const { app, errors, log } = await setUp(t, { connection })
  const answer = await app.inject('/')
  t.match(answer.json(), UNAVAILABLE)
  t.notMatch(answer.body, /localhost|127\.0\.0\.1|::1|ECONNREFUSED/)
  t.match(errors[0]?.cause, { message: /ECONNREFUSED/ })
  t.match(log.join(''), /ECONNREFUSED/, 'the reason is in the log')
  t.match(app.db.snapshot(), NOTHING)
})

test('a host without an address is UNAVAILABLE, until it has one', async (t) => {
  let known = false
  const lookup: LookupFunction = (hostname, options, done) => {
    const error = Object.assign(new Error(`getaddrinfo ENOTFOUND ${hostname}`), { code: 'ENOTFOUND' })
    if (!known) done(error, '')
    else if (options.all) done(null, [{ address: '127.0.0.1', family: 4 }])
    else done(null, '127.0.0.1', 4)
  }
  class NamedSocket extends Socket {
    override connect(...[port, host]: unknown[]): this {
      return super.connect({ port: port as number, host: host as string, lookup })
    }
  }
  const { port, username, password, pathname } = new URL(database.connectionString)
  const { app, errors } = await setUp(t, {
    connection: {
      host: 'db.example',
      port: Number(port),
      user: username,
      password,
      database: pathname.slice(1),
      stream: () => new NamedSocket(),
    },
  })
  const answer = await app.inject('/')
  t.match(answer.json(), UNAVAILABLE)
  t.notMatch(answer.body, /db\.example|ENOTFOUND/)
  t.match(errors[0]?.cause, { code: 'ENOTFOUND' })
  t.match(app.db.snapshot(), NOTHING)
  known = true
  t.equal((await app.inject('/')).statusCode, 200)
})

test('a wrong password is UNAVAILABLE, and neither it nor the user is told to anybody', async (t) => {
  const url = new URL(database.connectionString)
  url.username = 'somebody'
  url.password = 'Se%3Acret'
  const { app, errors, log } = await setUp(t, { connectionString: url.href })
  const answer = await app.inject('/')
  t.match(answer.json(), UNAVAILABLE)
  t.notMatch(answer.body, /somebody|cret|28P01/)
  t.match(errors[0]?.cause, { code: '28P01' }, 'whoever debugs finds it')
  t.notMatch(inspect(errors[0], { depth: 20, showHidden: true }), /cret/)
  t.notMatch(log.join(''), /cret/)
  t.match(app.db.snapshot(), NOTHING)
})

test('a database that does not exist is UNAVAILABLE', async (t) => {
  const url = new URL(database.connectionString)
  url.pathname = '/no_such_database'
  const { app, errors } = await setUp(t, { connectionString: url.href })
  const answer = await app.inject('/')
  t.match(answer.json(), UNAVAILABLE)
  t.notMatch(answer.body, /no_such_database/)
  t.match(errors[0]?.cause, { code: '3D000' })
  t.match(app.db.snapshot(), NOTHING)
})

test('a socket path that is not there, and TLS that the server does not speak, are UNAVAILABLE', async (t) => {
  const nowhere = await setUp(t, { connection: { host: '/no/such/folder', user: 'u', database: 'd' } })
  t.match((await nowhere.app.inject('/')).json(), UNAVAILABLE)
  t.match(nowhere.errors[0]?.cause, { code: 'ENOENT' })
  const url = new URL(database.connectionString)
  const { hostname: host, port, username: user, password, pathname } = url
  const encrypted = await setUp(t, {
    connection: { host, port: Number(port), user, password, database: pathname.slice(1), ssl: true },
  })
  t.match((await encrypted.app.inject('/')).json(), UNAVAILABLE)
  t.match(encrypted.errors[0]?.cause, { message: /SSL/ })
  t.match(encrypted.app.db.snapshot(), NOTHING)
})

test('a password that cannot be fetched is UNAVAILABLE, and fetched anew by the next', async (t) => {
  const { hostname: host, port, username: user, password, pathname } = new URL(database.connectionString)
  const answers = [
    () => Promise.reject(new Error('the vault is sealed')),
    () => 42 as unknown as string,
    () => Promise.resolve(password),
  ]
  const { app, errors } = await setUp(t, {
    connection: { host, port: Number(port), user, database: pathname.slice(1), password: () => answers.shift()!() },
  })
  const answer = await app.inject('/')
  t.match(answer.json(), UNAVAILABLE)
  t.notMatch(answer.body, /vault/)
  t.match((await app.inject('/')).json(), UNAVAILABLE)
  t.match(errors[0]?.cause, { message: 'the vault is sealed' })
  t.equal((await app.inject('/')).statusCode, 200)
})

test('a server that is starting up is UNAVAILABLE until it is up', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { app, errors } = await setUp(t, { connectionString: proxy.connectionString, pool: { size: 1 } })
  proxy.failStartup('57P03', 2, 'the database system is starting up')
  for (let i = 0; i < 2; i++) {
    const answer = await app.inject('/')
    t.match(answer.json(), UNAVAILABLE)
    t.notMatch(answer.body, /starting up|57P03/)
    t.match(errors[i]?.cause, { code: '57P03' })
    t.match(app.db.snapshot(), NOTHING)
  }
  t.equal((await app.inject('/')).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, idle: 1, totals: { failedConnects: 2, opened: 1 } })
})

test('a server without a connection left is UNAVAILABLE, and one that is free again is used', async (t) => {
  const server = await ownServer(t, { flags: ['max_connections=10'] })
  const hoarder = new pg.Pool({ connectionString: server.connectionString, max: 20 })
  hoarder.on('error', () => {})
  t.teardown(() => hoarder.end())
  const clients: pg.PoolClient[] = []
  const fill = async (): Promise<void> => {
    const client = await hoarder.connect().catch(() => undefined)
    if (client === undefined || clients.push(client) === 20) return
    client.on('error', () => {})
    await fill()
  }
  await fill()
  const { app, errors } = await setUp(t, { connectionString: server.connectionString, pool: { size: 3 } })
  for (const answer of await Promise.all([1, 2, 3, 4].map(() => app.inject('/')))) t.match(answer.json(), UNAVAILABLE)
  t.match(errors[0]?.cause, { code: '53300' })
  t.match(app.db.snapshot(), { ...NOTHING, totals: { failedConnects: 4 } })
  await Promise.all(clients.map((client) => client.release(true)))
  await eventually(async () => (await app.inject('/')).statusCode === 200)
  t.match(app.db.snapshot(), { checkedOut: 0, waiting: 0 })
})

test('a pool larger than what the server has to give serves what it can', async (t) => {
  const server = await ownServer(t, { flags: ['max_connections=8'] })
  const own = await createDatabase(t, { sql: NOTES, server })
  const app = await buildApp(t, own, { pool: { size: 20 } }, (app) => {
    app.post('/:note', async ({ db, params }) => {
      await add(db, (params as { note: string }).note)
    })
  })
  const kept: string[] = []
  for (let round = 0; round < 3; round++) {
    const answers = await Promise.all(
      Array.from({ length: 20 }, (_, i) => app.inject({ method: 'POST', url: `/${round}-${i}` })),
    )
    for (const [i, answer] of answers.entries()) {
      if (answer.statusCode === 200) kept.push(`${round}-${i}`)
      else t.match(answer.json(), UNAVAILABLE)
    }
  }
  t.ok(kept.length >= 3)
  t.strictSame((await notesIn(own)).sort(), kept.sort())
})

test('PgBouncer, which refuses startup parameters, is sent none that it refuses', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.refuseParameters('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'options')
  const { app } = await setUp(t, {
    connectionString: proxy.connectionString,
    statementTimeoutMillis: 1000,
    readOnly: true,
  })
  t.equal((await app.inject('/')).statusCode, 200)
})

test('closing gives up what is being connected, at once', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { app } = await setUp(t, { connectionString: proxy.connectionString, pool: { size: 1 } })
  proxy.silenceStartup()
  const connecting = app.inject('/')
  const queued = app.inject('/')
  await eventually(() => proxy.recordings.length === 1 && app.db.snapshot().waiting === 1)
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 1000)
  for (const answer of [connecting, queued]) t.match((await answer).json(), { code: 'FST_REQUEST_DB_POOL_CLOSED' })
  await eventually(() => proxy.recordings[0]?.closed === true)
  t.equal(proxy.recordings.length, 1)
})
