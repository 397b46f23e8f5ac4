import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import { type CancelTarget, cancelOnServer } from '../../lib/pool/cancel.ts'
import { freePort } from '../support/cluster.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { startProxy } from '../support/proxy.ts'
import { type Test, t } from '../support/test.ts'
import { startTlsProxy } from '../support/tls-proxy.ts'

const database = await createDatabase(t)

/** A backend to be cancelled, and the way to it through a proxy. */
async function setUp(t: Test) {
  const proxy = await startProxy(t, database.connectionString)
  const client = new pg.Client({ connectionString: database.connectionString, application_name: 'victim' })
  client.on('error', () => {})
  await client.connect()
  t.teardown(() => client.end())
  const { processID: pid, secretKey } = client as unknown as { processID: number; secretKey: number }
  const target: CancelTarget = {
    host: '127.0.0.1',
    port: proxy.port,
    pid,
    secretKey,
    ssl: false,
    sslNegotiation: 'postgres',
    stream: undefined,
  }
  const sleeps = async () => {
    const ended = client.query('select pg_sleep(30)').catch((error) => error)
    await eventually(async () => (await database.backends('victim'))[0]?.state === 'active')
    return { ended }
  }
  return { proxy, client, target, sleeps }
}

const cancel = (target: CancelTarget, timeoutMillis = 5000) =>
  new Promise<boolean>((resolve) => cancelOnServer(target, timeoutMillis, resolve))

t.test('stops what the backend runs, and says so when the server has hung up', async (t) => {
  const { proxy, client, target, sleeps } = await setUp(t)
  const { ended } = await sleeps()
  t.equal(await cancel(target), true)
  t.match(await ended, { code: '57014' })
  t.strictSame(proxy.cancels, [target.pid])
  t.match(proxy.recordings, [{ kind: 'cancel', askedForTls: false }])
  t.match((await client.query('select 1 as i')).rows, [{ i: 1 }], 'the connection is as good as before')
})

t.test('says so too where nothing runs, and nothing comes after', async (t) => {
  const { client, target } = await setUp(t)
  for (let i = 0; i < 20; i++) {
    t.equal(await cancel(target), true)
    await client.query('begin')
    await client.query('rollback')
  }
})

t.test('with the wrong key nothing is cancelled, and nothing is hurt', async (t) => {
  const { client, target, sleeps } = await setUp(t)
  const { ended } = await sleeps()
  t.equal(await cancel({ ...target, secretKey: target.secretKey ^ 1 }), true)
  t.equal((await database.backends('victim'))[0]?.state, 'active')
  t.equal(await cancel(target), true)
  await ended
  await client.query('select 1')
})

t.test('is uncertain where nobody listens', async (t) => {
  const { target } = await setUp(t)
  t.equal(await cancel({ ...target, port: await freePort() }), false)
})

t.test('is uncertain where the request is cut off', async (t) => {
  const { proxy, target } = await setUp(t)
  proxy.trap({ from: 'client', type: 'cancel' }, 'reset')
  t.equal(await cancel(target), false)
})

t.test('is uncertain where nobody answers, after its time and not before', async (t) => {
  const { proxy, target } = await setUp(t)
  proxy.trap({ from: 'client', type: 'cancel' }, 'swallow')
  const since = performance.now()
  t.equal(await cancel(target, 200), false)
  const after = performance.now() - since
  t.ok(after >= 195 && after < 1500, `after ${after} ms`)
  await eventually(() => proxy.recordings[0]?.closed === true)
})

t.test('is certain only once the server has hung up, however long that takes', async (t) => {
  const { proxy, target } = await setUp(t)
  const held = proxy.trap({ from: 'client', type: 'cancel' }, 'hold')
  let certain: boolean | undefined
  void cancel(target).then((answer) => {
    certain = answer
  })
  await held.sprung
  await new Promise((resolve) => setImmediate(resolve))
  t.equal(certain, undefined)
  held.release()
  await eventually(() => certain === true)
})

t.test('goes through the stream of the connection’s own making', async (t) => {
  const { target } = await setUp(t)
  const made: Socket[] = []
  const stream = () => {
    made.push(new Socket())
    return made[0]
  }
  t.equal(await cancel({ ...target, stream }), true)
  t.equal(made.length, 1)
})

t.test('goes to the socket file of a server on this machine', async (t) => {
  const { target } = await setUp(t)
  const folder = await mkdtemp(join(tmpdir(), 'socket-'))
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  let packet: Buffer | undefined
  const server = createServer((socket) => {
    socket.on('data', (data: Buffer) => {
      packet = data
      socket.end()
    })
  })
  t.teardown(() => server.close())
  server.listen(join(folder, '.s.PGSQL.5432'))
  await once(server, 'listening')
  t.equal(await cancel({ ...target, host: folder, port: 5432 }), true)
  t.equal(packet?.readInt32BE(4), 80877102)
  t.equal(packet?.readInt32BE(8), target.pid)
  t.equal(packet?.readInt32BE(12), target.secretKey)
})

for (const sslNegotiation of ['postgres', 'direct']) {
  t.test(`goes through TLS where the connection does, negotiated as '${sslNegotiation}'`, async (t) => {
    const { target, sleeps } = await setUp(t)
    const { port, cert, counts } = await startTlsProxy(t, database.connectionString)
    const { ended } = await sleeps()
    const ssl = { ca: cert, servername: 'localhost', ALPNProtocols: ['postgresql'] }
    t.equal(await cancel({ ...target, host: 'localhost', port, ssl, sslNegotiation }), true)
    t.match(await ended, { code: '57014' })
    t.strictSame(counts, { secure: 1, cancels: 1 })
  })
}

t.test('is uncertain where TLS is wanted and the server does not speak it', async (t) => {
  const { proxy, target } = await setUp(t)
  t.equal(await cancel({ ...target, ssl: true }), false)
  t.strictSame(proxy.cancels, [], 'nothing is said in the clear')
})
