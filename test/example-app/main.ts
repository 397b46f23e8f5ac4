import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmod, mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { isRunning } from '../../example-app/process.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { sharedServer } from '../support/server.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))
const folder = await mkdtemp(join(tmpdir(), 'fastify-request-db-example-'))
await chmod(folder, 0o755)
t.teardown(() => rm(folder, { recursive: true, force: true }))

// Each run is a process of its own, some of them two, and a machine may be slow.
t.setTimeout(180_000)

interface Run {
  readonly child: ChildProcess
  readonly out: () => string
  readonly err: () => string
  /** The exit code, or the signal that killed it. */
  readonly ended: Promise<number | NodeJS.Signals | null>
}

/** `npm start` without npm, in a process group of its own as in a terminal. */
function start(
  t: Test,
  env: NodeJS.ProcessEnv = {},
  command = [process.execPath, '--import=tsx', 'example-app/main.ts'],
): Run {
  const [program = '', ...args] = command
  const child = spawn(program, args, {
    cwd: root,
    env: { ...process.env, DATABASE_URL: '', DATA_FOLDER: folder, PORT: '0', ...env },
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

async function listening(t: Test, env: NodeJS.ProcessEnv = {}, command?: string[]): Promise<Run> {
  const run = start(t, env, command)
  const describe = () => `not listening: ${run.out()} ${run.err()}`
  await eventually(() => run.out().includes('Ctrl-C stops it'), { withinMillis: 60_000, describe })
  return run
}

/** As Ctrl-C does: to everybody in the foreground. */
const pressCtrlC = ({ child }: Run) => process.kill(-(child.pid ?? Number.NaN), 'SIGINT')

async function postmasterPid(): Promise<number> {
  const version = (await readdir(folder)).find((name) => /^\d+$/.test(name))
  return Number.parseInt(await readFile(join(folder, String(version), 'data', 'postmaster.pid'), 'utf8'), 10)
}

/** What curl would do with a line that was printed. */
async function curl(line: string): Promise<Response> {
  const [url, header, data] = [...line.matchAll(/'([^']*)'/g)].map(([, quoted]) => quoted)
  if (!url || !data) return fetch(String(url))
  const [name, value] = String(header).split(': ')
  return fetch(url, { method: 'POST', headers: { [String(name)]: String(value) }, body: data })
}

t.test('it prints three curl lines that work, and Ctrl-C ends it', async (t) => {
  const run = await listening(t)
  const pid = await postmasterPid()
  const lines = run.out().match(/^curl .*$/gm) ?? []
  t.equal(lines.length, 3)
  const [search = '', book = '', all = ''] = lines
  t.match(await (await curl(search)).json(), { airports: [{ city: 'London' }] })
  const booked = await curl(book)
  t.equal(booked.status, 201)
  t.match(await booked.json(), { passenger: 'Ada Lovelace', skipped: [] })
  t.match(await (await curl(all)).text(), /^id,passenger.*\r\n1,Ada Lovelace,/)
  const [page = ''] = run.out().match(/http:\S+\/db\b/) ?? []
  t.match(await (await fetch(page)).text(), /<title>Pool/, 'the page is where it says')
  t.match(run.out(), /^Mail to ada@example.org: Your trip 1 is booked$/m)

  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.match(run.out(), /Stopping\nThe app is closed\nPostgreSQL is stopped\n$/)
  t.equal(run.err(), '')
  t.notOk(await isRunning(pid), 'PostgreSQL is gone')
})

t.test('Ctrl-C pressed twice ends it as well', async (t) => {
  const run = await listening(t)
  const pid = await postmasterPid()
  pressCtrlC(run)
  pressCtrlC(run)
  await eventually(() => run.out().includes('Stopping'))
  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.equal(run.err(), '')
  t.notOk(await isRunning(pid), 'PostgreSQL is gone')
})

t.test('Ctrl-C while it starts ends it', async (t) => {
  const run = start(t)
  await eventually(() => run.out().includes('PostgreSQL listens'), { withinMillis: 30_000 })
  const pid = await postmasterPid()
  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.equal(run.err(), '')
  t.notOk(await isRunning(pid), 'PostgreSQL is gone')
})

t.test('someone who never finishes asking does not hold it up for ever', async (t) => {
  const run = await listening(t)
  const { hostname, port } = new URL(/http:\S+/.exec(run.out())?.[0] ?? '')
  const socket = connect(Number(port), hostname)
  t.teardown(() => socket.destroy())
  await once(socket, 'connect')
  socket.write('GET /trips HTTP/1.1\r\n')
  run.child.kill('SIGTERM')
  t.equal(await run.ended, 0)
  t.match(run.out(), /PostgreSQL is stopped\n$/)
})

t.test('after a run that was killed it starts again, with the data of before', async (t) => {
  const first = await listening(t)
  const pid = await postmasterPid()
  const [, book] = first.out().match(/^curl .*$/gm) ?? []
  const booked = (await curl(String(book))).headers.get('location')
  first.child.kill('SIGKILL')
  t.equal(await first.ended, 'SIGKILL')
  t.ok(await isRunning(pid), 'PostgreSQL has survived it')

  const second = await listening(t)
  t.match(second.out(), 'Stopping the PostgreSQL that a killed run left behind')
  t.notOk(await isRunning(pid), 'the one of before is gone')
  const [, , all] = second.out().match(/^curl .*$/gm) ?? []
  t.match(await (await curl(String(all))).text(), new RegExp(`^${booked?.split('/').at(-1)},Ada`, 'm'))
  pressCtrlC(second)
  t.equal(await second.ended, 0)
})

t.test('it ends when npm and its shell do', async (t) => {
  const command = ['sh', '-c', `"${process.execPath}" --import=tsx example-app/main.ts; true`]
  const run = await listening(t, { npm_lifecycle_event: 'start' }, command)
  const pid = await postmasterPid()
  // To the shell alone, which does not hand it on. Its output closes when the app has ended.
  run.child.kill('SIGTERM')
  t.equal(await run.ended, 'SIGTERM')
  t.match(run.out(), /Stopping\nThe app is closed\nPostgreSQL is stopped\n$/)
  t.notOk(await isRunning(pid), 'PostgreSQL is gone')
})

t.test('a second run on the same data leaves the first one alone', async (t) => {
  const first = await listening(t)
  const second = start(t)
  t.equal(await second.ended, 1)
  t.match(second.err(), new RegExp(`^The data in .* are in use by process ${first.child.pid}: .*\n$`))
  t.equal((await fetch(/http:\S+/.exec(first.out())?.[0] ?? '')).status, 404, 'the first one answers')
  pressCtrlC(first)
  t.equal(await first.ended, 0)
})

t.test('with DATABASE_URL it uses that database', async (t) => {
  const { connectionString, rows } = await createDatabase(t)
  const run = await listening(t, { DATABASE_URL: connectionString, DATA_FOLDER: join(folder, 'unused') })
  t.ok((await rows('airports')).length > 6000)
  t.notOk((await readdir(folder)).includes('unused'), 'no PostgreSQL of its own')
  pressCtrlC(run)
  t.equal(await run.ended, 0)
  t.match(run.out(), /Stopping\nThe app is closed\n$/)
})

t.test('what it cannot start with is said in one sentence', async (t) => {
  const taken = createServer().listen(0, '127.0.0.1')
  t.teardown(() => taken.close())
  await once(taken, 'listening')
  const address = taken.address()
  const port = String(address && typeof address === 'object' ? address.port : undefined)
  const server = new URL(await sharedServer())
  const stranger = Object.assign(new URL(server), { username: 'stranger', password: 'secret' }).href
  const nowhere = Object.assign(new URL(server), { pathname: '/nowhere' }).href
  const wrong: [NodeJS.ProcessEnv, RegExp][] = [
    [{ PORT: port }, new RegExp(`^Port ${port} is in use: free it, or set PORT to another\n$`)],
    [{ PORT: 'http' }, /^PORT is http, but has to be a number from 0 to 65535\n$/],
    [{ DATABASE_URL: 'trips' }, /^DATABASE_URL has to look like postgres:.*\n$/],
    [
      { DATABASE_URL: 'postgres://127.0.0.1:1/trips' },
      /^The database 127.0.0.1:1\/trips cannot be used: .*REFUSED.*\n$/,
    ],
    [{ DATABASE_URL: stranger }, /^The database .* cannot be used: .*"stranger".*\n$/],
    [{ DATABASE_URL: nowhere }, /^The database .* cannot be used: database "nowhere" does not exist\n$/],
  ]
  for (const [env, message] of wrong) {
    const run = start(t, env)
    t.equal(await run.ended, 1)
    t.match(run.err(), message)
    // The log may tell why there is no connection.
    t.notMatch(run.out(), /^(PostgreSQL|The app) listens/m, 'and nothing was started')
    t.notMatch(run.err(), /secret/)
  }
})
