import { connect } from 'node:net'
import pg from 'pg'
import { createDatabase } from './database.ts'
import { eventually } from './eventually.ts'
import { startProxy } from './proxy.ts'
import { type Test, t, test } from './test.ts'

const database = await createDatabase(t, { sql: 'create table seats (id int primary key)' })

async function setUp(t: Test) {
  const proxy = await startProxy(t, database.connectionString)
  const open = async (options: pg.ClientConfig = {}) => {
    const client = new pg.Client({ connectionString: proxy.connectionString, ...options })
    client.on('error', () => {})
    t.teardown(() => void client.end().catch(() => {}))
    await client.connect()
    return client
  }
  return { proxy, open }
}

test('records flights, answers, round trips and the end of a connection', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open({ application_name: 'recorded' })
  t.equal(proxy.roundTrips(), 0, 'start-up is not counted')
  await client.query('begin')
  await client.query('insert into seats values ($1)', [1])
  await t.rejects(client.query('select 1/$1::int', [0]))
  await client.query('rollback')
  t.strictSame(proxy.statements(), [['begin'], ['insert into seats values ($1)'], ['select 1/$1::int'], ['rollback']])
  t.strictSame(
    proxy.flights.map(({ messages, tags, errors, status }) => ({ messages, tags, errors, status })),
    [
      { messages: 'Q', tags: ['BEGIN'], errors: [], status: 'T' },
      { messages: 'PBDES', tags: ['INSERT 0 1'], errors: [], status: 'T' },
      { messages: 'PBDES', tags: [], errors: ['22012'], status: 'E' },
      { messages: 'Q', tags: ['ROLLBACK'], errors: [], status: 'I' },
    ],
  )
  t.equal(proxy.roundTrips(), 4)
  t.match(proxy.sessions, [{ parameters: { application_name: 'recorded' }, askedForTls: false, terminated: false }])
  proxy.clear()
  await client.query({ name: 'again', text: 'select 2' })
  await client.query({ name: 'again', text: 'select 2' })
  t.strictSame(proxy.statements(), [['select 2'], ['select 2']], 'the second has no Parse')
  t.equal(proxy.roundTrips(), 2)
  await client.end()
  await eventually(() => proxy.sessions[0]?.closed === true)
  t.equal(proxy.sessions[0]?.terminated, true)
})

test('takes several statements under one Sync for one flight', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  const { connection } = client as unknown as { connection: pg.Connection & Record<string, (message?: object) => void> }
  connection.stream.cork()
  for (const text of ['begin', 'select 1', 'commit']) {
    connection.parse({ name: '', text, types: [] }, true)
    connection.bind({ values: [] } as never, true)
    connection.execute({} as never, true)
  }
  const ready = new Promise((resolve) => connection.once('readyForQuery', resolve))
  connection.sync()
  connection.stream.uncork()
  await ready
  t.match(proxy.flights, [
    {
      statements: ['begin', 'select 1', 'commit'],
      messages: 'PBEPBEPBES',
      chunks: 1,
      tags: ['BEGIN', 'SELECT 1', 'COMMIT'],
    },
  ])
  t.equal(proxy.roundTrips(), 1)
})

test('delays each direction', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  proxy.delay({ toServer: 30, toClient: 40 })
  const start = performance.now()
  await client.query('select 1')
  const took = performance.now() - start
  t.ok(took >= 70, `${took} ms`)
})

test('cuts at a message of the client: it never arrives', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  const { sprung } = proxy.trap({ from: 'client', type: 'Q', text: 'COMMIT' }, 'reset')
  await client.query('begin')
  await client.query('insert into seats values (2)')
  await t.rejects(client.query('commit'))
  t.match(await sprung, { kind: 'session' })
  t.strictSame(await database.rows('seats'), [])
})

test('cuts at a message of the server: only the answer is lost', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'end')
  await client.query('begin')
  await client.query('insert into seats values (3)')
  await t.rejects(client.query('commit'))
  t.strictSame(await database.rows('seats'), [{ id: 3 }])
})

test('holds an answer back until it is released', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  const trap = proxy.trap({ from: 'server', type: 'C', text: 'SELECT' }, 'hold')
  let answered = false
  const query = client.query('select 1').then(() => {
    answered = true
  })
  await trap.sprung
  await database.query('select 1')
  t.equal(answered, false)
  trap.release()
  await query
  t.equal(answered, true)
})

test('a hole swallows the open connection and lets new ones through', async (t) => {
  const { proxy, open } = await setUp(t)
  const old = await open()
  proxy.swallow()
  let settled = false
  old.query('select 1').catch(() => {
    settled = true
  })
  const fresh = await open()
  t.equal((await fresh.query('select 1 as one')).rows[0].one, 1)
  t.equal(settled, false)
  const pid = proxy.sessions[0]?.pid
  ;(old as unknown as { connection: { stream: { destroy(): void } } }).connection.stream.destroy()
  await eventually(async () => !(await database.backends()).some((backend) => backend.pid === pid))
  t.pass('the client that gives up frees its backend')
})

test('start-up: silence, a FATAL answer, refused parameters, nobody listening', async (t) => {
  const { proxy, open } = await setUp(t)
  proxy.silenceStartup(1)
  await t.rejects(open({ connectionTimeoutMillis: 100 }), /timeout/)
  await open()
  proxy.failStartup('57P03', 1)
  await t.rejects(open(), { code: '57P03', severity: 'FATAL' })
  await open()
  proxy.refuseParameters('statement_timeout')
  await t.rejects(open({ statement_timeout: 1000 }), { code: '08P01' })
  await open()
  await proxy.refuse()
  await t.rejects(open(), { code: 'ECONNREFUSED' })
  await proxy.accept()
  await open()
})

test('recognises a cancel request and passes it on', async (t) => {
  const { proxy, open } = await setUp(t)
  const client = await open()
  const { processID, secretKey } = client as unknown as Record<'processID' | 'secretKey', number>
  const sleeping = client.query('select pg_sleep(30)')
  await eventually(async () => (await database.backends()).some(({ state }) => state === 'active'))
  const cancel = Buffer.alloc(16)
  ;[16, 80877102, processID, secretKey].forEach((word, index) => void cancel.writeInt32BE(word, index * 4))
  connect(proxy.port, '127.0.0.1').end(cancel)
  await t.rejects(sleeping, { code: '57014' })
  t.strictSame(proxy.cancels, [proxy.sessions[0]?.pid])
})
