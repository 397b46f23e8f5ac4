import { type AddressInfo, createServer } from 'node:net'
import { sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, terminate, verbs } from '../support/notebook.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import { buildRelay, forEachStyle, freeze, handedOver, notesOf, RELAY, type Relay, STYLES } from '../support/relay.ts'
import { type Test, t, test } from '../support/test.ts'
import { fatalResponse } from '../support/wire.ts'

const database = await createDatabase(t, { sql: RELAY })

const UNKNOWN = { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' }
const LOST = { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' }
const HELD = [['BEGIN', 'INSERT'], ['COMMIT']]

type Answer = Promise<{ statusCode: number; json(): unknown }>

/** What a request is told whose COMMIT nobody knows of: in the answer, or, where that had left, in the log. */
async function isUnknown(t: Test, { log }: Relay, answer: Answer, commitOn: string): Promise<void> {
  const { statusCode, json } = await answer
  if (commitOn === 'onSend') t.match(json(), UNKNOWN)
  else t.equal(statusCode, 200)
  const isReported = () => log.lines.some(({ err }) => err?.code === UNKNOWN.code)
  await eventually(isReported)
}

for (const style of STYLES) {
  const { name } = style

  inBothModes(database, `the backend is terminated in COMMIT, '${name}' is behind`, async (t, commitOn) => {
    const { leaves, isWhole = false } = style
    const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 10_000 })
    const { app, proxy } = relay
    const ice = await freeze(t, database)
    const first = await relay.hold('slow A')
    const second = await relay.enqueue(`/${name}/B`)
    first.letGo()
    const pid = await ice.frozen()
    t.equal(pid, proxy.sessions[0]!.pid)
    await handedOver(relay)
    t.strictSame(verbs(proxy), [...HELD, leaves], 'its first flight is there already')
    await terminate(database, pid)
    await isUnknown(t, relay, first.answer, commitOn)
    const answer = await second.answer
    if (!isWhole || commitOn === 'onResponse') t.equal(answer.statusCode, 200)
    else t.match(answer.json(), LOST, 'the server said goodbye before it came to it')
    await holds(t, database, isWhole ? [] : notesOf(style, 'B'))
    t.strictSame(verbs(proxy).slice(3, 4), isWhole ? [] : [leaves], 'it is sent again unless COMMIT was in it')
    const failedCommits = isWhole ? 2 : 1
    const totals = { handOvers: 1, replays: 2 - failedCommits, failedCommits, invalidated: 1, cancels: 0 }
    t.match(app.db.snapshot().totals, totals)
  })
}

forEachStyle(
  database,
  (name) => `the answer to COMMIT is lost, '${name}' is behind`,
  async (t, style, commitOn) => {
    const { name, leaves, isWhole = false } = style
    const relay = await buildRelay(t, database, { commitOn })
    const { app, proxy } = relay
    const answered = proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'hold')
    const first = await relay.hold('A')
    const second = await relay.enqueue(`/${name}/B`)
    first.letGo()
    await answered.sprung
    await handedOver(relay)
    await eventually(() => proxy.flights[2]?.status !== undefined, { describe: () => 'the server answers it all' })
    proxy.cut('reset')
    await isUnknown(t, relay, first.answer, commitOn)
    const answer = await second.answer
    if (!isWhole) t.equal(answer.statusCode, 200)
    else t.match(answer.json(), UNKNOWN, 'here the server had come to it')
    await holds(t, database, ['A', ...notesOf(style, 'B')])
    t.strictSame(verbs(proxy).slice(0, 4), [...HELD, leaves, ...(isWhole ? [] : [leaves])])
    t.match(app.db.snapshot().totals, { handOvers: 1, replays: isWhole ? 0 : 1, invalidated: 1, cancels: 0 })
  },
)

forEachStyle(
  database,
  (name) => `COMMIT is never answered, '${name}' is behind`,
  async (t, style, commitOn) => {
    const { name, leaves, isWhole = false } = style
    const relay = await buildRelay(t, database, { commitOn, settleTimeoutMillis: 400 })
    const { app, proxy } = relay
    proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
    const first = await relay.hold('A')
    const second = await relay.enqueue(`/${name}/B`)
    first.letGo()
    await isUnknown(t, relay, first.answer, commitOn)
    const answer = await second.answer
    if (!isWhole && name !== 'unawaited') t.match(answer.json(), LOST, 'a second try could meet the locks of the first')
    else if (commitOn === 'onSend') t.match(answer.json(), isWhole ? UNKNOWN : LOST)
    await holds(t, database, [])
    t.strictSame(verbs(proxy), [...HELD, leaves], 'it is not sent again')
    t.match(app.db.snapshot(), { open: 0, totals: { handOvers: 1, replays: 0, invalidated: 1, cancels: 0 } })
    t.equal((await relay.post('/one/C')).statusCode, 200)
    await holds(t, database, ['C'])
  },
)

inBothModes(database, 'a goodbye that crosses COMMIT on its way', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn })
  const { proxy } = relay
  const goodbye = proxy.trap({ from: 'server', type: 'E', text: '57P01' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/parallel/B')
  await terminate(database, proxy.sessions[0]!.pid!)
  await goodbye.sprung
  first.letGo()
  await handedOver(relay)
  goodbye.release()
  await isUnknown(t, relay, first.answer, commitOn)
  t.equal((await second.answer).statusCode, 200)
  await holds(t, database, ['B', 'B', 'B'])
})

for (const way of ['one', 'added'] as const) {
  inBothModes(database, `COMMIT is answered, and then the connection ends: '${way}' is behind`, async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn })
    const { app, proxy, log } = relay
    const first = await relay.hold('A')
    const second = await relay.enqueue(`/${way}/B`)
    proxy.trap({ from: 'server', type: 'Z', text: 'I' }, 'end')
    first.letGo()
    t.equal((await first.answer).statusCode, 200, 'its COMMIT is certain')
    const answer = await second.answer
    if (way === 'added' && commitOn === 'onSend') t.match(answer.json(), UNKNOWN)
    else t.equal(answer.statusCode, 200)
    await nothingIsLeft(t)
    const notes = (await database.rows('notes')).map(({ note }) => note)
    t.equal(notes[0], 'A')
    if (way === 'one') t.strictSame(notes, ['A', 'B'])
    else t.ok([1, 3].includes(notes.length), 'both of its rows, or none')
    const commits = way === 'one' ? 2 : 1
    t.match(app.db.snapshot().totals, { commits, failedCommits: 2 - commits, replays: commits - 1, handOvers: 1 })
    t.equal(log.problems().length, way === 'added' && commitOn === 'onResponse' ? 1 : 0)
  })
}

inBothModes(
  database,
  'the connection dies when who was behind has begun: it is not sent again',
  async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn })
    const { app, proxy } = relay
    const first = await relay.hold('A')
    const second = await relay.enqueue('/one/B')
    const third = await relay.enqueue('/nested/C')
    proxy.trap({ from: 'server', type: 'C', text: 'INSERT' }, 'reset')
    first.letGo()
    t.equal((await first.answer).statusCode, 200)
    t.match((await second.answer).json(), LOST)
    t.equal((await third.answer).statusCode, 200)
    await holds(t, database, ['A', 'C'])
    t.match(app.db.snapshot().totals, { commits: 2, failedCommits: 0, replays: 0, handOvers: 1, invalidated: 1 })
  },
)

for (const how of ['end', 'reset'] as const) {
  inBothModes(database, `the connection dies (${how}) at ROLLBACK, who is behind is replayed`, async (t, commitOn) => {
    const relay = await buildRelay(t, database, { commitOn })
    const { app, proxy } = relay
    proxy.trap({ from: 'server', type: 'C', text: 'ROLLBACK' }, how)
    const first = await relay.hold('throws A')
    const second = await relay.enqueue('/one/B')
    first.letGo()
    t.match((await first.answer).json(), { statusCode: 500, message: 'mine' })
    t.equal((await second.answer).statusCode, 200)
    await holds(t, database, ['B'])
    t.match(app.db.snapshot().totals, { handOvers: 1, replays: 1, rollbacks: 1, opened: 2, failedCommits: 0 })
  })
}

test('a deferred write is killed, COMMIT behind it, and somebody behind that', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  await database.query('delete from notes')
  const lock = await database.client()
  t.teardown(() => lock.end())
  await lock.query('begin; lock table notes in exclusive mode')
  const first = relay.post('/added/A')
  await eventually(() => proxy.flights.length === 1)
  const second = relay.post('/parallel/B')
  await handedOver(relay, 2)
  await eventually(async () => (await database.backends()).some(({ waitEvent }) => waitEvent === 'relation'))
  await terminate(database, proxy.sessions[0]!.pid!)
  await lock.query('rollback')
  t.match((await first).json(), LOST, 'its COMMIT had not had its turn')
  t.equal((await second).statusCode, 200)
  await holds(t, database, ['B', 'B', 'B'])
  t.match(app.db.snapshot().totals, { handOvers: 1, replays: 1, failedCommits: 1 })
})

test('who was sent again is not sent a third time', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  await database.query('delete from notes')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/one/B')
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset', { times: 2 })
  first.letGo()
  t.match((await first.answer).json(), UNKNOWN, 'BEGIN came right behind its COMMIT')
  t.match((await second.answer).json(), LOST)
  t.match(app.db.snapshot(), { open: 0, totals: { handOvers: 1, replays: 1, invalidated: 2 } })
  t.equal((await relay.post('/one/C')).statusCode, 200)
})

test('who finds no server for its second try is UNAVAILABLE, and the slot is free', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  await database.query('delete from notes')
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/nested/B')
  await proxy.refuse()
  first.letGo()
  t.match((await first.answer).json(), UNKNOWN)
  t.match((await second.answer).json(), { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' })
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  await proxy.accept()
  t.equal((await relay.post('/nested/C')).statusCode, 200)
  await holds(t, database, ['C'])
})

test('a second try takes an idle connection where there is one', async (t) => {
  const relay = await buildRelay(t, database, { pool: { size: 2 } })
  const { app } = relay
  await database.query('delete from notes')
  const ice = await freeze(t, database)
  const other = await relay.hold('D')
  const first = await relay.hold('slow A')
  const second = await relay.enqueue('/one/B')
  first.letGo()
  const pid = await ice.frozen()
  await handedOver(relay, 4)
  other.letGo()
  t.equal((await other.answer).statusCode, 200)
  await eventually(() => app.db.snapshot().idle === 1)
  await terminate(database, pid)
  t.match((await first.answer).json(), UNKNOWN)
  t.equal((await second.answer).statusCode, 200)
  t.match(app.db.snapshot(), { open: 1, totals: { opened: 2, replays: 1 } })
  await holds(t, database, ['D', 'B'])
})

test('who is sent again keeps its place in the queue', async (t) => {
  const relay = await buildRelay(t, database)
  const { app, proxy } = relay
  await database.query('delete from notes')
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset')
  const first = await relay.hold('A')
  const order: string[] = []
  const queued: Promise<unknown>[] = []
  for (const note of ['B', 'C', 'D']) {
    const { answer } = await relay.enqueue(`/one/${note}`)
    queued.push(answer.then(() => order.push(note)))
  }
  first.letGo()
  await Promise.all([first.answer, ...queued])
  t.strictSame(order, ['B', 'C', 'D'])
  await holds(t, database, ['B', 'C', 'D'])
  t.match(app.db.snapshot().totals, { replays: 1, opened: 2 })
})

inBothModes(database, 'callbacks are called once, however often a session is sent', async (t, commitOn) => {
  for (const end of ['replayed', 'obstructed', 'unknown', 'overdue'] as const) {
    // Only where COMMIT is in its first flight.
    if (end === 'unknown' && commitOn === 'onResponse') continue
    const called: string[] = []
    const pool = end === 'overdue' ? { timeoutMillis: 100 } : {}
    const relay = await buildRelay(t, database, { commitOn, pool, settleTimeoutMillis: 1000 }, (app) => {
      app.post('/calls/:note', async ({ db }) => {
        db.afterCommit(() => called.push('commit'))
        db.afterRollback(() => called.push('rollback'))
        if (end === 'unknown') db.add(db.insertInto('notes').values({ note: 'B' }))
        else await add(db, 'B')
      })
    })
    const { app, proxy } = relay
    const first = await relay.hold(end === 'obstructed' ? 'failing A' : 'A')
    const last = end === 'obstructed' ? { type: 'E', text: '23502' } : { type: 'C', text: 'COMMIT' }
    const answered = proxy.trap({ from: 'server', ...last }, 'hold')
    const second = await relay.enqueue('/calls/B')
    first.letGo()
    await answered.sprung
    await handedOver(relay)
    if (end === 'overdue') await eventually(() => app.db.snapshot().totals.timeouts === 1)
    if (end === 'obstructed' || end === 'overdue') answered.release()
    else proxy.cut('end')
    await Promise.all([first.answer, second.answer])
    await nothingIsLeft(t)
    const expected = { replayed: ['commit'], obstructed: ['commit'], unknown: [], overdue: ['rollback'] }
    t.strictSame(called, expected[end], end)
  }
})

inBothModes(database, 'a statement of its own that fails behind a COMMIT is its own error', async (t, commitOn) => {
  const relay = await buildRelay(t, database, { commitOn }, (app) => {
    app.post('/fails/:note', ({ db }) => Promise.all([add(db, 'lost'), sql`select 1/0`.execute(db), add(db, 'lost')]))
  })
  const { app, proxy } = relay
  const answered = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
  const first = await relay.hold('A')
  const second = await relay.enqueue('/fails/B')
  const third = await relay.enqueue('/nested/C')
  first.letGo()
  await answered.sprung
  await handedOver(relay)
  answered.release()
  t.equal((await first.answer).statusCode, 200)
  t.match((await second.answer).json(), { statusCode: 500, code: '22012' })
  t.equal((await third.answer).statusCode, 200)
  await holds(t, database, ['A', 'C'])
  t.match(app.db.snapshot().totals, { handOvers: 2, opened: 1, invalidated: 0, cancels: 0, commits: 2, rollbacks: 1 })
})

test('a server that says goodbye in its welcome is not asked again and again', async (t) => {
  // AuthenticationOk, BackendKeyData, ReadyForQuery and FATAL in one packet: granted and dead in one turn.
  const welcome = Buffer.from('R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I', 'latin1')
  let connections = 0
  const server = createServer((socket) => {
    connections++
    socket.on('error', () => {})
    socket.once('data', () => socket.end(Buffer.concat([welcome, fatalResponse('57P01', 'going down')])))
  })
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  t.teardown(() => server.close())
  const { port } = server.address() as AddressInfo
  const connectionString = `postgres://nobody@127.0.0.1:${port}/none?sslmode=disable`
  const app = await buildApp(t, database, { connectionString, pool: { size: 1, timeoutMillis: 300 } }, (app) => {
    app.get('/', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  const answers = Promise.all([app.inject('/'), app.inject('/')])
  await eventually(() => connections > 0)
  const late = new Promise((resolve) => setTimeout(resolve, 2000))
  const answered = await Promise.race([answers, late])
  t.ok(answered, `no answer within 2 s, but ${connections} connections`)
  t.ok(connections <= 4, `${connections} connections`)
  server.close()
  for (const { statusCode } of await answers) t.equal(statusCode, 503)
})
