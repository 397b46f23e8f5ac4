import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { chown, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir, userInfo } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import type { Test } from 'tap'
import { isSoWithin } from './eventually.ts'
import { freePort } from './free-port.ts'

/** What stands in the section `[pgbouncer]`. */
export type PgBouncerSettings = Readonly<Record<string, string | number>>

/** A PgBouncer of a test's own, in transaction pooling mode unless told otherwise. Gone at the test's end. */
export interface PgBouncer {
  readonly port: number
  /** The same user and database as the server's connection string that it was started with, through PgBouncer. */
  readonly connectionString: string
  /** A command of the admin console, such as `PAUSE` or `SHOW POOLS`. */
  admin(command: string): Promise<Record<string, unknown>[]>
  start(): Promise<void>
  /** SIGTERM: at once, clients are not waited for. */
  stop(): Promise<void>
  /** As a crash. */
  kill(): Promise<void>
  /** What it has logged so far. */
  log(): string
}

// PgBouncer refuses to run as root.
const NOBODY = 65_534
// Debian keeps it where only root looks.
const ENVIRONMENT = { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` }
const IS_ROOT = userInfo().uid === 0
const READY_MILLIS = 10_000
const STOPPED_MILLIS = 10_000

/** Where PgBouncer is missing: the reason to skip what needs it. Where CI has forgotten to install it, an error. */
export function noPgBouncer(): string | false {
  const isThere = spawnSync('pgbouncer', ['--version'], { env: ENVIRONMENT }).status === 0
  if (isThere) return false
  if (process.env.CI === 'true') throw new Error('pgbouncer is not installed: apt-get install pgbouncer')
  return 'pgbouncer is not installed'
}

const DEFAULTS: PgBouncerSettings = {
  pool_mode: 'transaction',
  listen_addr: '127.0.0.1',
  unix_socket_dir: '',
  auth_type: 'trust',
  admin_users: 'postgres',
  max_client_conn: 1000,
  default_pool_size: 20,
  // A server that is down is tried again soon, and whoever waits for it is told soon.
  server_login_retry: 1,
  query_wait_timeout: 10,
}

/** Starts one in front of the server of `connectionString`, on a port of its own. */
export async function startPgBouncer(
  t: Test,
  connectionString: string,
  settings: PgBouncerSettings = {},
): Promise<PgBouncer> {
  const url = new URL(connectionString)
  const folder = await mkdtemp(join(tmpdir(), 'fastify-request-db-pgbouncer-'))
  const port = await freePort()
  const users = join(folder, 'users.txt')
  const ini = join(folder, 'pgbouncer.ini')
  await writeFile(users, `"${decodeURIComponent(url.username)}" "${decodeURIComponent(url.password)}"\n`)
  await writeFile(ini, iniOf(url, { ...DEFAULTS, listen_port: port, auth_file: users, ...settings }))
  if (IS_ROOT) for (const path of [folder, users, ini]) await chown(path, NOBODY, NOBODY)

  let running: Running | undefined
  let log = ''
  const end = async (signal: NodeJS.Signals) => {
    const ending = running
    running = undefined
    await ending?.end(signal)
  }
  const bouncer: PgBouncer = {
    port,
    connectionString: through(url, port).href,
    admin: (command) => askAdmin(url, port, command),
    start: async () => {
      running = await launch(ini, (text) => {
        log += text
      })
    },
    stop: () => end('SIGTERM'),
    kill: () => end('SIGKILL'),
    log: () => log,
  }
  t.teardown(async () => {
    await end('SIGTERM')
    await rm(folder, { recursive: true, force: true })
  })
  await bouncer.start()
  return bouncer
}

function iniOf({ hostname, port }: URL, settings: PgBouncerSettings): string {
  const lines = Object.entries(settings).map(([name, value]) => `${name} = ${value}`)
  return ['[databases]', `* = host=${hostname} port=${port || 5432}`, '[pgbouncer]', ...lines, ''].join('\n')
}

function through(url: URL, port: number, database?: string): URL {
  const pooled = new URL(url)
  pooled.host = `127.0.0.1:${port}`
  if (database !== undefined) pooled.pathname = `/${database}`
  return pooled
}

async function askAdmin(url: URL, port: number, command: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client({ connectionString: through(url, port, 'pgbouncer').href })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query(command)).rows
  } finally {
    await client.end()
  }
}

interface Running {
  end(signal: NodeJS.Signals): Promise<void>
}

// A shell that waits for PgBouncer, and ends it when nobody holds the shell's input any more: where the test's process was
// killed. Then nobody else deletes the folder either.
const GUARD = `
  pgbouncer "$0" & echo pid $!
  read -r word; [ "$word" = keep ] || kill -9 $!
  wait; [ "$word" = keep ] || rm -rf "$(dirname "$0")"`

async function launch(ini: string, onLog: (text: string) => void): Promise<Running> {
  const as = IS_ROOT ? { uid: NOBODY, gid: NOBODY } : {}
  // In a process group of its own: Ctrl-C in the terminal is for the test, which ends it.
  const guard = spawn('sh', ['-c', GUARD, ini], {
    ...as,
    env: ENVIRONMENT,
    detached: true,
    stdio: ['pipe', 'pipe', 'pipe'],
  })
  let said = ''
  guard.stderr.on('data', (chunk) => {
    said += chunk
    onLog(String(chunk))
  })
  const [first] = (await once(guard.stdout, 'data')) as [Buffer]
  const pid = Number(/pid (\d+)/.exec(String(first))?.[1])
  const running = { end: (signal: NodeJS.Signals) => endOf(guard, pid, signal) }
  // A connection to find out would be a client, of which there may be few.
  if (await isSoWithin(READY_MILLIS, () => said.includes('process up'))) return running
  await running.end('SIGKILL')
  throw new Error(`PgBouncer did not start:\n${said}`)
}

async function endOf(guard: ChildProcess, pid: number, signal: NodeJS.Signals): Promise<void> {
  const isOver = () => guard.exitCode !== null || guard.signalCode !== null
  // The shell has not waited for it yet, so that the pid is still its own.
  if (!isOver()) process.kill(pid, signal)
  guard.stdin?.end('keep\n')
  if (await isSoWithin(STOPPED_MILLIS, isOver)) return
  process.kill(pid, 'SIGKILL')
  throw new Error(`PgBouncer did not end within ${STOPPED_MILLIS} ms after ${signal}`)
}
