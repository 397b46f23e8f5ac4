/**
 * What the plugin needs of pg that pg does not promise. All of it is used in lib/pool (connection, flight, cancel).
 * `PG_FOLDER=/somewhere/node_modules/pg node --import=tsx test/pg-internals.ts` asks another version of pg.
 */
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { Socket } from 'node:net'
import { dirname, join } from 'node:path'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { startProxy } from './support/proxy.ts'
import { type Test, t } from './support/test.ts'

const require = createRequire(import.meta.url)
const folder = process.env.PG_FOLDER ?? dirname(require.resolve('pg/package.json'))
const pg = require(folder) as Internals
const { version } = JSON.parse(await readFile(join(folder, 'package.json'), 'utf8')) as { version: string }

interface Emitter {
  on(event: string, listener: (argument: never) => void): this
  once(event: string, listener: (argument: never) => void): this
}
interface Wire extends Emitter {
  readonly stream: Socket
  parse(message: object): void
  bind(message: object): void
  describe(message: object): void
  execute(message: object): void
  close(message: object): void
  flush(): void
  sync(): void
  connect(port: number, host: string): void
  cancel(pid: number, secretKey: number): void
}
interface Client extends Emitter {
  pipeline: boolean
  readonly connection: Wire
  readonly host: string
  readonly port: number
  readonly processID: number
  readonly secretKey: number
  readonly ssl: unknown
  readonly sslNegotiation: string
  readonly binary: boolean
  readonly _types: { getTypeParser(oid: number, format: string): (text: string) => unknown }
  connect(done: (error: Error | null) => void): void
  query(query: object): unknown
  query(text: string): Promise<{ rows: unknown[] }>
  end(done: () => void): void
  getTransactionStatus(): 'I' | 'T' | 'E' | null
}
interface Result {
  command: string | null
  rowCount: number | null
  rows: unknown[]
  addFields(fields: unknown[]): void
  parseRow(fields: unknown[]): unknown
  addCommandComplete(message: unknown): void
}
interface Internals {
  readonly Client: new (config: object) => Client
  readonly Query: new (config: object) => object
  readonly Result: new (rowMode: undefined, types: unknown) => Result
  readonly Connection: new (config: object) => Wire
  readonly DatabaseError: new (...args: never[]) => Error & { severity: string; code: string }
  readonly utils: { prepareValue(value: unknown): unknown }
}

const database = await createDatabase(t, { sql: 'create table notes (note text)' })

/** A flight as the plugin makes them: a pg.Query that writes its messages itself, and writes down what it is told. */
class Flight {
  readonly write: (wire: Wire) => void
  readonly told: [string, never?][] = []

  constructor(write: (wire: Wire) => void) {
    this.write = write
  }
  submit(wire: Wire): void {
    wire.stream.cork()
    this.write(wire)
    wire.sync()
    wire.stream.uncork()
  }
  get events(): string[] {
    return this.told.map(([event]) => event)
  }
}
// Its prototype makes it one, for pg's client; the constructor is not run.
Object.setPrototypeOf(Flight.prototype, pg.Query.prototype)
for (const event of [
  'RowDescription',
  'DataRow',
  'CommandComplete',
  'EmptyQuery',
  'PortalSuspended',
  'CopyInResponse',
  'CopyData',
  'Error',
  'ReadyForQuery',
]) {
  Object.defineProperty(Flight.prototype, `handle${event}`, {
    value(this: Flight, message: never) {
      this.told.push([event, message])
    },
  })
}

function ask(wire: Wire, text: string, values: unknown[] = []): void {
  wire.parse({ text })
  wire.bind({ portal: '', values, binary: false })
  wire.describe({ type: 'P', name: '' })
  wire.execute({ portal: '', rows: 0 })
}

/** A client in pipeline mode, its ReadyForQuerys and its errors. */
async function open(t: Test, config: object = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const client = new pg.Client({ connectionString: proxy.connectionString, ...config })
  const errors: Error[] = []
  const statuses: string[] = []
  client.on('error', (error: never) => errors.push(error))
  await new Promise<void>((resolve, reject) => client.connect((error) => (error ? reject(error) : resolve())))
  client.pipeline = true
  client.connection.on('readyForQuery', ({ status }: { status: string }) => void statuses.push(status))
  t.teardown(() => client.connection.stream.destroy())
  /** Sends flights at once; resolves when the last of them is answered. */
  const fly = async (...flights: Flight[]): Promise<void> => {
    const expected = statuses.length + flights.length
    for (const flight of flights) client.query(flight)
    await eventually(() => statuses.length === expected)
  }
  return { proxy, client, errors, statuses, fly }
}

t.test(`pg ${version}: a client tells what the plugin must know of it`, async (t) => {
  const { client, proxy } = await open(t)
  t.match(client, { host: '127.0.0.1', port: proxy.port, ssl: false, sslNegotiation: 'postgres', binary: false })
  t.equal(typeof client.processID, 'number')
  t.equal(typeof client.secretKey, 'number')
  t.equal(client._types.getTypeParser(23, 'text')('42'), 42)
  t.ok(client.connection.stream instanceof Socket)
  t.equal(client.getTransactionStatus(), 'I')
  t.equal(new pg.Client({}).pipeline, false)
})

t.test('in pipeline mode flights leave at once, each with one Sync and in one piece', async (t) => {
  const { proxy, statuses, fly } = await open(t)
  const flights = [
    new Flight((wire) => {
      wire.parse({ text: 'BEGIN' })
      wire.bind({ portal: '', values: [], binary: false })
      wire.execute({ portal: '', rows: 0 })
      wire.flush()
      ask(wire, 'select $1::int as i, $2::text as t', ['7', null])
    }),
    new Flight(() => {}),
    new Flight((wire) => ask(wire, 'COMMIT')),
  ]
  proxy.delay(20)
  await fly(...flights)
  t.strictSame(
    proxy.flights.map(({ messages, chunks }) => ({ messages, chunks })),
    ['PBEHPBDES', 'S', 'PBDES'].map((messages) => ({ messages, chunks: 1 })),
  )
  t.equal(proxy.roundTrips(), 1)
  t.strictSame(statuses, ['T', 'T', 'I'])
  t.strictSame(
    flights.map(({ events }) => events),
    [
      ['CommandComplete', 'RowDescription', 'DataRow', 'CommandComplete', 'ReadyForQuery'],
      ['ReadyForQuery'],
      ['CommandComplete', 'ReadyForQuery'],
    ],
  )
})

t.test('a Result is built from what a flight is told', async (t) => {
  const { client, fly } = await open(t)
  const flight = new Flight((wire) => ask(wire, 'select 7 as i, null as n union all select 8, null'))
  await fly(flight)
  const result = new pg.Result(undefined, client._types)
  for (const [event, message] of flight.told as unknown as [string, { fields: unknown[] }][]) {
    if (event === 'RowDescription') result.addFields(message.fields)
    if (event === 'DataRow') result.rows.push(result.parseRow(message.fields))
    if (event === 'CommandComplete') result.addCommandComplete(message)
  }
  t.match(result, { command: 'SELECT', rowCount: 2 })
  t.strictSame(
    result.rows.map((row) => ({ ...(row as object) })),
    [
      { i: 7, n: null },
      { i: 8, n: null },
    ],
  )
})

t.test('a portal is suspended, read on and closed', async (t) => {
  const { proxy, fly } = await open(t)
  const begin = new Flight((wire) => ask(wire, 'begin'))
  const first = new Flight((wire) => {
    wire.parse({ text: 'select generate_series(1, 3)' })
    wire.bind({ portal: 'p', values: [], binary: false })
    wire.describe({ type: 'P', name: 'p' })
    wire.execute({ portal: 'p', rows: 2 })
  })
  const next = new Flight((wire) => wire.execute({ portal: 'p', rows: 2 }))
  const close = new Flight((wire) => wire.close({ type: 'P', name: 'p' }))
  await fly(begin, first, next, close)
  t.strictSame(first.events, ['RowDescription', 'DataRow', 'DataRow', 'PortalSuspended', 'ReadyForQuery'])
  t.strictSame(next.events, ['DataRow', 'CommandComplete', 'ReadyForQuery'])
  t.strictSame(close.events, ['ReadyForQuery'])
  t.equal(proxy.flights.at(-1)?.messages, 'CS')
})

t.test('an empty statement is told as such', async (t) => {
  const { fly } = await open(t)
  const empty = new Flight((wire) => ask(wire, ''))
  await fly(empty)
  t.strictSame(empty.events, ['EmptyQuery', 'ReadyForQuery'])
})

t.test(
  'a refusal reaches its flight and no other; the flight is not told of ReadyForQuery, the connection is',
  async (t) => {
    const { client, statuses, fly } = await open(t)
    const flights = ['begin', 'select 1/0', 'select 1', 'rollback', 'select 1 as i'].map(
      (text) => new Flight((wire) => ask(wire, text)),
    )
    await fly(...flights)
    t.strictSame(
      flights.map(({ events }) => events),
      [
        ['CommandComplete', 'ReadyForQuery'],
        ['Error'],
        ['Error'],
        ['CommandComplete', 'ReadyForQuery'],
        ['RowDescription', 'DataRow', 'CommandComplete', 'ReadyForQuery'],
      ],
    )
    t.strictSame(statuses, ['T', 'E', 'E', 'I', 'I'])
    const [refusal] = flights[1]!.told
    t.ok((refusal![1] as unknown) instanceof pg.DatabaseError)
    t.match(refusal![1], { severity: 'ERROR', code: '22012' })
    t.equal(client.getTransactionStatus(), 'I')
  },
)

t.test('a goodbye of the server reaches the active flight as FATAL, and the client as errors', async (t) => {
  const { client, errors } = await open(t)
  const [active, next] = [
    new Flight((wire) => ask(wire, 'select pg_terminate_backend(pg_backend_pid()), pg_sleep(5)')),
    new Flight((wire) => ask(wire, 'select 1')),
  ]
  client.query(active)
  client.query(next)
  await eventually(() => errors.length > 0 || next.events.length > 0)
  const [event, error] = active.told.at(-1)!
  t.equal(event, 'Error')
  t.match(error, { severity: 'FATAL', code: '57P01' })
})

t.test('a backend killed while idle is told as an error of the client, and nothing is thrown', async (t) => {
  const { client, errors } = await open(t)
  await database.query('select pg_terminate_backend($1, 5000)', [client.processID])
  await eventually(() => errors.length > 0)
  t.match(errors[0], { severity: 'FATAL', code: '57P01' })
})

t.test('a socket that breaks is told as an error without a severity', async (t) => {
  const { proxy, errors } = await open(t)
  proxy.cut('reset')
  await eventually(() => errors.length > 0)
  t.notOk(errors[0] instanceof pg.DatabaseError)
})

t.test('destroying the stream is the end of it, without an exception', async (t) => {
  const { client, proxy, errors } = await open(t)
  client.query(new Flight((wire) => ask(wire, 'select pg_sleep(1)')))
  await eventually(() => proxy.flights.length === 1)
  client.connection.stream.destroy()
  await eventually(() => errors.length > 0)
})

t.test('pipeline mode is switched off and on again on a quiet connection', async (t) => {
  const { client, statuses, fly } = await open(t)
  const asks = (text: string) => new Flight((wire) => ask(wire, text))
  for (let round = 0; round < 3; round++) {
    const [a, b] = [asks('select 1 as i'), asks('select 2 as i')]
    await fly(a, b)
    client.pipeline = false
    const scripts = (await client.query('select 3 as i; select 4 as i')) as unknown as { rows: unknown[] }[]
    t.match(scripts, [{ rows: [{ i: 3 }] }, { rows: [{ i: 4 }] }], 'scripts are for the simple protocol')
    t.match(await client.query({ text: 'select $1::int as i', values: [5] }), { rows: [{ i: 5 }] })
    const sync = new Flight(() => {})
    const before = statuses.length
    client.query(sync)
    await eventually(() => statuses.length === before + 1)
    t.strictSame(sync.events, ['ReadyForQuery'])
    client.pipeline = true
  }
})

t.test('COPY FROM STDIN asks its flight for rows', async (t) => {
  const { client } = await open(t)
  const copy = new Flight((wire) => ask(wire, 'copy notes from stdin'))
  client.query(copy)
  await eventually(() => copy.events.includes('CopyInResponse'))
})

t.test('the connect callback comes once, with the error, and the socket can be given up', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.silenceStartup()
  const calls: unknown[] = []
  const client = new pg.Client({ connectionString: proxy.connectionString })
  client.on('error', () => {})
  client.connect((error) => calls.push(error))
  await eventually(() => proxy.recordings.length === 1)
  client.connection.stream.destroy()
  await eventually(() => calls.length > 0)
  t.match(calls, [Error])
  const timed = new pg.Client({ connectionString: proxy.connectionString, connectionTimeoutMillis: 50 })
  timed.on('error', () => {})
  const error = await new Promise((resolve) => timed.connect(resolve))
  t.match(error, { message: /timeout/ })
})

t.test('end() says goodbye, and calls back when the server has hung up', async (t) => {
  const { client, proxy } = await open(t)
  await new Promise<void>((resolve) => client.end(resolve))
  t.equal(proxy.sessions[0]?.terminated, true)
})

t.test('a bare Connection cancels what a backend runs', async (t) => {
  const { client, proxy, errors } = await open(t)
  const sleep = new Flight((wire) => ask(wire, 'select pg_sleep(30)'))
  client.query(sleep)
  await eventually(async () => (await database.backends())[0]?.state === 'active')
  let made = 0
  const stream = () => {
    made++
    return new Socket()
  }
  const wire = new pg.Connection({ ssl: false, sslNegotiation: 'postgres', stream })
  const ended = once(wire as unknown as NodeJS.EventEmitter, 'end')
  wire.once('connect', () => wire.cancel(client.processID, client.secretKey))
  wire.connect(proxy.port, '127.0.0.1')
  await ended
  await eventually(() => sleep.events.includes('Error'))
  t.match(sleep.told.at(-1)?.[1], { code: '57014' })
  t.strictSame(proxy.cancels, [client.processID])
  t.equal(made, 1)
  t.strictSame(errors, [])
})

t.test('values are mapped by utils.prepareValue', async (t) => {
  const { prepareValue } = pg.utils
  const mapped = [null, undefined, 5, true, 12n, 'text', { a: 1 }, [1, null], { toPostgres: () => 'mine' }].map(
    (value) => prepareValue(value),
  )
  t.strictSame(mapped, [null, null, '5', 'true', '12', 'text', '{"a":1}', '{"1",NULL}', 'mine'])
  t.throws(
    () =>
      prepareValue({
        toPostgres: () => {
          throw new Error('mine')
        },
      }),
    { message: 'mine' },
  )
})
