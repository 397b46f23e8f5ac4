import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdtemp, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { isRunning } from '../../example-app/process.ts'
import { type Backend, createDatabase, type Database } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { HttpClient } from '../support/http-client.ts'
import { ownServer } from '../support/server.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))
const WITHIN = { withinMillis: 60_000 }

// Each run is several processes, and a machine may be slow.
t.setTimeout(240_000)

interface Run {
  readonly child: ChildProcess
  readonly out: () => string
  readonly err: () => string
  /** The exit code, or the signal that killed it. */
  readonly ended: Promise<number | NodeJS.Signals | null>
}

/** `npm run start:cluster` without npm, in a process group of its own as in a terminal. */
function start(t: Test, env: NodeJS.ProcessEnv): Run {
  const child = spawn(process.execPath, ['--import=tsx', 'example-app/cluster.ts'], {
    cwd: root,
    env: { ...process.env, DATABASE_URL: '', PORT: '0', WORKERS: '2', WEB_CONCURRENCY: '', ...env },
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  const texts = { out: '', err: '' }
  child.stdout.on('data', (chunk) => {
    texts.out += chunk
  })
  child.stderr.on('data', (chunk) => {
    texts.err += chunk
  })
  const ended = once(child, 'close').then(([code, signal]) => code ?? signal)
  t.teardown(() => {
    child.kill('SIGTERM')
    return ended
  })
  return { child, out: () => texts.out, err: () => texts.err, ended }
}

async function listening(t: Test, env: NodeJS.ProcessEnv): Promise<Run & { readonly url: URL }> {
  const run = start(t, env)
  const describe = () => `not listening: ${run.out()} ${run.err()}`
  await eventually(() => run.out().includes('Ctrl-C stops them') || run.child.exitCode !== null, {
    ...WITHIN,
    describe,
  })
  return { ...run, url: new URL(/listen on (http:\S+)/.exec(run.out())?.[1] ?? describe()) }
}

/** As Ctrl-C does: to everybody in the foreground. */
const pressCtrlC = ({ child }: Run) => process.kill(-(child.pid ?? Number.NaN), 'SIGINT')

/** A connection that stays with the worker it has come to. */
class Visitor extends HttpClient {
  worker = Number.NaN

  static async to(t: Test, url: URL): Promise<Visitor> {
    const visitor = new Visitor(Number(url.port))
    t.teardown(() => visitor.destroy())
    await once(visitor.socket, 'connect')
    await visitor.search()
    return visitor
  }

  async search(): Promise<unknown> {
    const { headers, body } = await this.send('GET', '/airports?q=london').response()
    this.worker = Number(headers['x-worker'])
    return JSON.parse(body)
  }

  book(...legs: [from: string, to: string][]): this {
    const wishes = legs.map(([from, to]) => ({ from, to }))
    return this.send('POST', '/trips', { body: { passenger: 'Ada', email: 'ada@example.org', legs: wishes } })
  }
}

/** One with each of so many workers. */
async function visitAll(t: Test, url: URL, count = 2): Promise<Visitor[]> {
  const visitors = new Map<number, Visitor>()
  await eventually(async () => {
    const visitor = await Visitor.to(t, url)
    if (visitors.has(visitor.worker)) visitor.destroy()
    else visitors.set(visitor.worker, visitor)
    return visitors.size === count
  }, WITHIN)
  return [...visitors.values()]
}

const seatsLeft = async (database: Database, from: string, to: string) => {
  const text = 'select seats_left as seats from flights where origin = $1 and destination = $2'
  return (await database.query<{ seats: number }>(text, [from, to]))[0]?.seats
}

/** Books, looks and cancels again and again until told to stop; resolves with how often. What was not right is kept. */
function keepAsking(visitor: Visitor) {
  let stopped = false
  const wrong: unknown[] = []
  const expect = async (status: number) => {
    const answer = await visitor.response(60_000)
    if (answer.status !== status) wrong.push(answer)
    return JSON.parse(answer.body)
  }
  const round = async () => {
    visitor.book(['SYD', 'AKL'])
    const { id } = await expect(201)
    visitor.send('GET', `/trips/${id}`)
    const { passenger } = await expect(200)
    visitor.send('DELETE', `/trips/${id}`)
    const { status } = await expect(200)
    if (passenger !== 'Ada' || status !== 'cancelled') wrong.push({ id, passenger, status })
  }
  const asking = (async () => {
    let rounds = 0
    for (; !stopped; rounds++) await round()
    return rounds
  })()
  return {
    wrong,
    stop: () => {
      stopped = true
      return asking
    },
  }
}

t.test('a worker killed in the middle of a transaction hurts nobody else, and is replaced', async (t) => {
  const database = await createDatabase(t)
  const run = await listening(t, { DATABASE_URL: database.connectionString })
  const [victim, neighbour] = (await visitAll(t, run.url)) as [Visitor, Visitor]
  const others = keepAsking(neighbour)
  const seats = await seatsLeft(database, 'AMS', 'LHR')

  // It has its first seat, and waits for the second one, which somebody else has locked.
  const lock = await database.client()
  await lock.query("begin; update flights set seats_left = seats_left where origin = 'LHR' and destination = 'JFK'")
  victim.book(['AMS', 'LHR'], ['LHR', 'JFK'])
  const isWaiting = ({ query, waitEvent }: Backend) => waitEvent === 'transactionid' && query.includes('flights')
  let pid: number | undefined
  await eventually(async () => {
    pid = (await database.backends()).find(isWaiting)?.pid
    return pid !== undefined
  }, WITHIN)
  // So that it does not go on when it gets the lock: its transaction stays open.
  process.kill(victim.worker, 'SIGSTOP')
  await lock.query('rollback')
  const state = async () => (await database.backends()).find((backend) => backend.pid === pid)?.state
  await eventually(async () => (await state()) === 'idle in transaction', WITHIN)

  process.kill(victim.worker, 'SIGKILL')
  await eventually(async () => (await state()) === undefined, WITHIN)
  t.equal(await seatsLeft(database, 'AMS', 'LHR'), seats, 'it is rolled back')
  await eventually(() => run.out().includes(`Worker ${victim.worker} ended with SIGKILL, another takes its`), WITHIN)
  const next = await Visitor.to(t, run.url)
  t.equal((await next.book(['AMS', 'LHR'], ['LHR', 'JFK']).response()).status, 201, 'its locks are free')
  t.equal(await seatsLeft(database, 'AMS', 'LHR'), Number(seats) - 1)

  const workers = (await visitAll(t, run.url)).map(({ worker }) => worker)
  t.notOk(workers.includes(victim.worker), 'another one has taken its place')
  t.ok(workers.includes(neighbour.worker), 'the neighbour has stayed')
  const rounds = await others.stop()
  t.ok(rounds > 0)
  t.strictSame(others.wrong, [], `${rounds} rounds of the neighbour were answered right`)
  t.equal((await database.query('select from trips')).length, rounds + 1, 'nothing of theirs is lost')

  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.match(run.out(), /Stopping\nThe workers are stopped\n$/)
  t.equal(run.err(), '')
  for (const pid of workers) t.notOk(await isRunning(pid), `worker ${pid} is gone`)
  t.strictSame(await database.backends(), [], 'and its connections')
})

t.test('a worker that cannot start is started once a second, until it can', async (t) => {
  const database = await createDatabase(t)
  const run = await listening(t, { DATABASE_URL: database.connectionString })
  const [victim] = (await visitAll(t, run.url)) as [Visitor, Visitor]
  const since = performance.now()
  // Nobody can shut the door of the database one is in.
  const elsewhere = await createDatabase(t)
  const letIn = (isAllowed: boolean) =>
    elsewhere.query(`alter database ${database.name} allow_connections ${isAllowed}`)
  await letIn(false)
  process.kill(victim.worker, 'SIGKILL')
  const failures = () =>
    run.out().match(/ended with code 1, another takes its place: The database .* cannot be used/g) ?? []
  await eventually(() => failures().length >= 3, WITHIN)
  t.ok(failures().length <= (performance.now() - since) / 1000 + 1, 'no more often than that')
  await letIn(true)
  const workers = (await visitAll(t, run.url)).map(({ worker }) => worker)
  t.notOk(workers.includes(victim.worker))
  run.child.kill('SIGTERM')
  t.equal(await run.ended, 0)
  t.strictSame(await database.backends(), [])
})

t.test('each worker counts all of them when it looks whether the server has room', async (t) => {
  const server = await ownServer(t, { flags: ['max_connections=30'] })
  const { connectionString: DATABASE_URL } = await createDatabase(t, { server })
  const two = await listening(t, { DATABASE_URL })
  await visitAll(t, two.url)
  two.child.kill('SIGTERM')
  t.equal(await two.ended, 0)
  t.notMatch(two.out(), /request-db/, '2 x 10 connections have room')

  const three = await listening(t, { DATABASE_URL, WORKERS: '3' })
  const warnings = () => three.out().match(/has room for \d+ connections, but 3 processes x \(size 10/g) ?? []
  await eventually(() => warnings().length === 3, { ...WITHIN, describe: three.out })
  t.match(three.out(), /"processesFrom":"WEB_CONCURRENCY"/)
  const [victim] = await visitAll(t, three.url, 3)
  process.kill(Number(victim?.worker), 'SIGKILL')
  await eventually(() => warnings().length === 4, { ...WITHIN, describe: three.out })
  pressCtrlC(three)
  t.equal(await three.ended, 0)
})

t.test('it starts a PostgreSQL of its own, and stops it last', async (t) => {
  const folder = await mkdtemp(join(tmpdir(), 'fastify-request-db-cluster-'))
  await chmod(folder, 0o755)
  t.teardown(() => rm(folder, { recursive: true, force: true }))
  const run = await listening(t, { DATA_FOLDER: folder })
  t.equal(run.out().match(/^curl .*$/gm)?.length, 3)
  const workers = await visitAll(t, run.url)
  pressCtrlC(run)
  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.match(run.out(), /Stopping\nThe workers are stopped\nPostgreSQL is stopped\n$/)
  t.equal(run.err(), '')
  for (const { worker } of workers) t.notOk(await isRunning(worker), `worker ${worker} is gone`)
  const port = /PostgreSQL listens on 127.0.0.1:(\d+)/.exec(run.out())?.[1]
  const socket = connect(Number(port), '127.0.0.1')
  const [error] = await once(socket, 'error')
  t.equal(error.code, 'ECONNREFUSED', 'PostgreSQL is gone')
})

t.test('workers whose first process was killed end by themselves', async (t) => {
  const database = await createDatabase(t)
  const run = await listening(t, { DATABASE_URL: database.connectionString })
  const workers = await visitAll(t, run.url)
  run.child.kill('SIGKILL')
  t.equal(await run.ended, 'SIGKILL')
  for (const { worker } of workers) await eventually(async () => !(await isRunning(worker)), WITHIN)
  await eventually(async () => (await database.backends()).length === 0, WITHIN)
})

t.test('what it cannot start with is said in one sentence, by one', async (t) => {
  const wrong: [NodeJS.ProcessEnv, RegExp][] = [
    [{ WORKERS: 'many' }, /^WORKERS is many, but has to be a number from 1 to 99\n$/],
    [
      { DATABASE_URL: 'postgres://127.0.0.1:1/trips' },
      /^The database 127.0.0.1:1\/trips cannot be used: .*REFUSED.*\n$/,
    ],
  ]
  for (const [env, message] of wrong) {
    const run = start(t, env)
    t.equal(await run.ended, 1)
    t.match(run.err(), message)
    t.notMatch(run.out(), /workers listen/)
  }
})
