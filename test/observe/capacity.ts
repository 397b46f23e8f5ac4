import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { Socket } from 'node:net'
import { fileURLToPath } from 'node:url'
import type { FastifyBaseLogger } from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import {
  type Capacity,
  type CapacityCheck,
  capacityWarning,
  checkCapacity,
  processesOf,
  readCapacity,
} from '../../lib/observe/capacity.ts'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase, type Database } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { startProxy } from '../support/proxy.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t, test } from '../support/test.ts'

const server = await ownServer(t, { flags: ['max_connections=20', 'reserved_connections=2'] })
const database = await createDatabase(t, { server })
await database.query("create role app login password 'app'")

/** As the pool's: a name of its own, and a user without privileges. */
function configOf({ connectionString }: { connectionString: string } = database, user = 'app'): pg.ClientConfig {
  const url = new URL(connectionString)
  url.username = user
  if (user !== 'postgres') url.password = 'app'
  return Object.freeze({ connectionString: url.href, fallback_application_name: 'the app' })
}

async function open(t: Test, config: pg.ClientConfig, times: number): Promise<pg.Client[]> {
  const clients = Array.from({ length: times }, () => new pg.Client(config))
  t.teardown(() => Promise.all(clients.map((client) => client.end())))
  for (const client of clients) client.on('error', () => {})
  await Promise.all(clients.map((client) => client.connect()))
  return clients
}

const appBackends = (of: Database = database) => of.backends('the app')

/** A socket on which the server's BackendKeyData arrives with another process id, as poolers send it. */
function renumbering(): Socket {
  const socket = new Socket()
  const emit = socket.emit.bind(socket) as (...all: unknown[]) => boolean
  const changed = (event: string, ...all: unknown[]) => {
    const [chunk] = all
    const at = event === 'data' && Buffer.isBuffer(chunk) ? chunk.indexOf(KEY_DATA) : -1
    if (at !== -1) (chunk as Buffer).writeUInt32BE(1, at + KEY_DATA.length)
    return emit(event, ...all)
  }
  return Object.assign(socket, { emit: changed as typeof socket.emit })
}
const KEY_DATA = Buffer.from([0x4b, 0, 0, 0, 12])

interface Line {
  readonly level: 'warn' | 'debug'
  readonly fields: { requestDb: Record<string, unknown>; err?: Error }
  readonly message: string
}

/** The check, and what it logged. */
async function check(options: Partial<CapacityCheck['options']>, config = configOf(), timeoutMillis = 2000) {
  const lines: Line[] = []
  const at = (level: Line['level']) => (fields: Line['fields'], message: string) => {
    lines.push({ level, fields, message })
  }
  const log = { warn: at('warn'), debug: at('debug') } as Pick<FastifyBaseLogger, 'warn' | 'debug'>
  const all = { name: 'db', size: 4, maxOverflow: 2, processes: 1, ...options }
  const capacity = await checkCapacity({ config, options: all, log, timeoutMillis })
  return { capacity, lines }
}

const EMPTY: Capacity = { maxConnections: 20, reserved: 5, ours: 0, others: 0 }

test('the number of processes is the option, else WEB_CONCURRENCY, else what the cluster knows, else one', async (t) => {
  const siblings = (known: object) => known as NonNullable<Parameters<typeof processesOf>[2]>
  const alone = siblings({ isPrimary: true, workers: {} })
  const primary = siblings({ isPrimary: true, workers: { 1: {}, 2: {}, 5: {} } })
  const worker = siblings({ isPrimary: false, worker: { id: 4 } })
  const env = { WEB_CONCURRENCY: '6' }
  t.strictSame(processesOf(3, env, primary), { count: 3, from: 'option' })
  t.strictSame(processesOf(undefined, env, primary), { count: 6, from: 'WEB_CONCURRENCY' })
  t.strictSame(processesOf(undefined, {}, primary), { count: 3, from: 'cluster' })
  t.strictSame(processesOf(undefined, {}, worker, 8), { count: 4, from: 'cluster' }, 'at least as many as its number')
  const replacement = siblings({ isPrimary: false, worker: { id: 99 } })
  t.strictSame(processesOf(undefined, {}, replacement, 8), { count: 8, from: 'cluster' }, 'the others are dead')
  t.strictSame(processesOf(undefined, {}, alone), { count: 1, from: 'default' })
  for (const nonsense of ['', 'auto', '0', '-2', '1.5']) {
    t.strictSame(processesOf(undefined, { WEB_CONCURRENCY: nonsense }, alone), { count: 1, from: 'default' }, nonsense)
  }
})

test('what fits is not spoken of, to the last connection', async (t) => {
  t.equal(capacityWarning({ processes: 1, size: 11, maxOverflow: 4, capacity: EMPTY }), undefined)
  t.equal(capacityWarning({ processes: 3, size: 5, maxOverflow: 0, capacity: { ...EMPTY, ours: 15 } }), undefined)
})

test('what does not fit is told with all numbers, and with the largest pool that would', async (t) => {
  const warning = capacityWarning({
    processes: 2,
    size: 16,
    maxOverflow: 4,
    capacity: { ...EMPTY, ours: 8, others: 2 },
  })
  t.equal(
    warning?.message,
    'PostgreSQL has room for 13 connections, but 2 processes x (size 16 + maxOverflow 4) can ask for 40; then it refuses ' +
      'connections (53300). Of its max_connections 20, 5 are reserved and 2 are used by others. Set pool.size to 2 and ' +
      'pool.maxOverflow to 4, or raise max_connections to at least 47, or put PgBouncer in between',
  )
  t.match(warning?.fields, { needed: 40, room: 13, others: 2, largestFit: { size: 2, maxOverflow: 4 } })
})

test('the overflow goes before the last connection, and the processes go before their only one', async (t) => {
  const tight = { ...EMPTY, others: 9 }
  const few = capacityWarning({ processes: 2, size: 16, maxOverflow: 4, capacity: tight })
  t.match(few?.message, 'Set pool.size to 3 and pool.maxOverflow to 0,')
  const none = capacityWarning({ processes: 7, size: 1, maxOverflow: 0, capacity: tight })
  t.match(none?.message, 'Not even one connection for each of 7 processes is left: run fewer of them, or raise')
  const nothing = capacityWarning({ processes: 1, size: 1, maxOverflow: 0, capacity: { ...EMPTY, others: 17 } })
  t.match(nothing?.message, 'room for 0 connections, but 1 process x')
})

test('what bears our name beyond what we can hold counts as others', async (t) => {
  const capacity = { ...EMPTY, ours: 14 }
  t.equal(capacityWarning({ processes: 1, size: 6, maxOverflow: 1, capacity }), undefined)
  const warning = capacityWarning({ processes: 1, size: 4, maxOverflow: 0, capacity: { ...EMPTY, ours: 16 } })
  t.match(warning?.fields, { others: 12, room: 3 })
})

test('the server says what it has: ours, our siblings included, others, and not the one that asks', async (t) => {
  await open(t, configOf(), 3)
  await open(t, { ...configOf(), application_name: 'another app' }, 2)
  await open(t, configOf(database, 'postgres'), 1)
  const before = await database.query<{ count: string }>(
    "select count(*) from pg_stat_activity where backend_type = 'client backend'",
  )
  for (const user of ['app', 'postgres']) {
    const capacity = await readCapacity(configOf(database, user), 2000)
    t.match(capacity, { maxConnections: 20, reserved: 5, ours: user === 'app' ? 3 : 1 }, user)
    t.equal(capacity.ours + capacity.others, Number(before[0]?.count), `${user} sees every client`)
  }
  t.equal((await appBackends()).length, 4, 'the connection that asked is closed')
})

test('the warning comes while there is still room, before the first connection is refused', async (t) => {
  await open(t, configOf(), 1)
  const { lines, capacity } = await check({ size: 8, maxOverflow: 4, processes: 2 })
  t.equal(lines.length, 1)
  const [line] = lines
  t.equal(line?.level, 'warn')
  t.match(line?.message, /^request-db: pool "db": PostgreSQL has room for \d+ connections, but 2 processes x \(size 8/)
  t.match(line?.fields, {
    requestDb: { event: 'capacity', pool: 'db', processes: 2, processesFrom: 'option', needed: 24, maxConnections: 20 },
  })
  const { size, maxOverflow } = line!.fields.requestDb.largestFit as { size: number; maxOverflow: number }
  t.match(capacity, { maxConnections: 20, reserved: 5, ours: 1 })

  // What was promised to fit does: both processes fill up, but for the one through which is asked.
  await open(t, configOf(), 2 * (size + maxOverflow) - 2)
  const again = await check({ size, maxOverflow, processes: 2 })
  t.strictSame(
    again.lines.map(({ level }) => level).filter((level) => level === 'warn'),
    [],
  )
})

test('where all fits nothing is logged but a line for debugging', async (t) => {
  const { lines, capacity } = await check({ size: 2, maxOverflow: 1, processes: 2 })
  t.match(lines, [{ level: 'debug', message: 'request-db: PostgreSQL has room for all of pool "db"' }])
  t.match(capacity, { maxConnections: 20 })
  t.strictSame(await appBackends(), [])
})

test('a server that refuses even this connection is full already, and that is said', async (t) => {
  const client = await database.client()
  const free = await readCapacity(configOf(), 2000)
  await open(t, configOf(), free.maxConnections - free.reserved - free.others)
  const { lines, capacity } = await check({})
  t.equal(capacity, undefined)
  t.match(lines, [{ level: 'warn', fields: { err: { code: '53300' } } }])
  t.match(lines[0]?.message, /^request-db: pool "db": PostgreSQL has no connection left \(53300\)/)
  await client.query('select 1')
})

test('a server that cannot be asked is a line for debugging, never an error', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const refusals: [string, pg.ClientConfig][] = [
    ['unknown role', configOf(database, 'nobody')],
    ['no such database', { ...configOf(), connectionString: `${configOf().connectionString}_not` }],
    ['no TLS', { ...configOf(), ssl: true }],
    ['nobody listens', { host: '127.0.0.1', port: 1 }],
    [
      'no password',
      {
        ...configOf(),
        connectionString: `${database.connectionString.replace(/\/\/.*@/, '//app@')}`,
        password: () => Promise.reject(new Error('vault is shut')),
      },
    ],
  ]
  for (const [what, config] of refusals) {
    const { lines, capacity } = await check({}, config)
    t.equal(capacity, undefined, what)
    t.match(lines, [{ level: 'debug', fields: { err: { message: String } } }], what)
  }
  proxy.trap({ from: 'client', type: 'Q', text: 'max_connections' }, 'reset')
  t.match((await check({}, configOf(proxy))).lines, [{ level: 'debug' }], 'cut while it asks')
  await eventually(async () => (await appBackends()).length === 0)
})

test('a server that is silent at start-up, or when asked, is given up when the time is over', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.silenceStartup(1)
  const atStart = await check({}, configOf(proxy), 100)
  t.match(atStart.lines, [{ level: 'debug', fields: { err: { message: 'No answer within 100 ms' } } }])
  proxy.trap({ from: 'client', type: 'Q', text: 'max_connections' }, 'swallow')
  const atQuery = await check({}, configOf(proxy), 500)
  t.match(atQuery.lines, [{ level: 'debug', fields: { err: { message: 'No answer within 500 ms' } } }])
  t.equal(proxy.sessions.length, 2)
  await eventually(() => proxy.sessions.every(({ closed }) => closed))
  await eventually(async () => (await appBackends()).length === 0)
})

test('behind a pooler, which announces process ids of its own, there is nothing to compare', async (t) => {
  const { lines, capacity } = await check({ size: 100 }, { ...configOf(), stream: renumbering })
  t.equal(capacity, undefined)
  t.match(lines, [
    { level: 'warn', message: /set the option pooler: 'transaction'/, fields: { err: { message: /pooler/ } } },
  ])
})

test('a process with nothing else to do does not stay for the answer', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.silenceStartup()
  const module = fileURLToPath(new URL('../../lib/observe/capacity.ts', import.meta.url))
  const script = `import { readCapacity } from ${JSON.stringify(module)}
    readCapacity(${JSON.stringify(configOf(proxy))}, 2 ** 31 - 1)`
  const child = spawn(process.execPath, ['--import=tsx', '--input-type=module', '-e', script], { stdio: 'inherit' })
  t.teardown(() => void child.kill())
  const [code] = await once(child, 'exit')
  t.equal(code, 0)
})

test('a process that closes while it is asked ends in good order, and at once', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.trap({ from: 'client', type: 'Q', text: 'max_connections' }, 'swallow')
  const index = fileURLToPath(new URL('../../lib/index.ts', import.meta.url))
  const script = `import Fastify from 'fastify'
    import requestDb from ${JSON.stringify(index)}
    const app = Fastify()
    await app.register(requestDb, { connectionString: ${JSON.stringify(proxy.connectionString)} })
    await app.ready()
    await app.db.ping()
    await app.close()
    console.log('closed')`
  const child = spawn(process.execPath, ['--import=tsx', '--input-type=module', '-e', script], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  t.teardown(() => void child.kill())
  const said: string[] = []
  child.stdout.on('data', (chunk) => said.push(String(chunk)))
  const [code] = await once(child, 'close')
  t.equal(code, 0)
  t.equal(said.join(''), 'closed\n')
})

test('an app is warned at its first connection, once, and before any is refused', async (t) => {
  const log = captureLog()
  const app = await buildApp(
    t,
    database,
    { connection: { ...configOf() }, capacityCheck: true, processes: 3, pool: { size: 8, maxOverflow: 4 } },
    (app) => {
      app.get('/', ({ db }) => sql`select 1`.execute(db))
    },
    { logger: log.options },
  )
  t.strictSame(log.problems(), [], 'not before it has connected')
  for (let request = 0; request < 3; request++) t.equal((await app.inject('/')).statusCode, 200)
  await eventually(() => log.problems().length > 0)
  await app.close()
  t.match(log.problems(), [{ level: 40, requestDb: { event: 'capacity', needed: 36, processes: 3 } }])
  t.equal(log.problems().length, 1)
})
