import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { appendFile, chown, cp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { serverAccount } from '../../example-app/postgres/account.ts'
import { findBinaries } from '../../example-app/postgres/binaries.ts'
import { type Cluster, FAST_AND_FORGETFUL, freePort } from './cluster.ts'
import { eventually } from './eventually.ts'

/** A primary that is stopped. */
export interface Original {
  readonly folder: string
  readonly connectionString: string
}

/** A hot standby of `original`, made of a copy of its folder; it follows as soon as the primary is back. */
export async function createStandby(folder: string, original: Original, flags: readonly string[]): Promise<Cluster> {
  const port = await freePort()
  await copyCluster(original, folder)
  const { postgres } = await findBinaries()
  const account = await serverAccount(folder)
  const settings = [...FAST_AND_FORGETFUL, ...flags].flatMap((flag) => ['-c', flag])
  let server: ChildProcess | undefined

  async function end(signal: NodeJS.Signals): Promise<void> {
    if (server === undefined) return
    const ended = once(server, 'exit')
    if (isRunning(server) && server.kill(signal)) await ended
    server = undefined
  }

  return {
    connectionString: atPort(original.connectionString, port),
    start: async () => {
      if (server !== undefined && isRunning(server)) return
      const child = spawn(postgres, ['-D', folder, '-p', String(port), ...settings], { ...account, stdio: 'pipe' })
      server = child
      const log: string[] = []
      for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => log.push(String(chunk)))
      const describe = () => `The standby did not start:\n${log.join('')}`
      await eventually(async () => !isRunning(child) || (await saysReady(folder)), { withinMillis: 60_000, describe })
      if (!isRunning(child)) throw new Error(describe())
    },
    stop: () => end('SIGINT'),
    kill: () => end('SIGQUIT'),
    remove: async () => {
      await end('SIGQUIT')
      await rm(folder, { recursive: true, force: true })
    },
  }
}

async function copyCluster(original: Original, folder: string): Promise<void> {
  await cp(original.folder, folder, { recursive: true })
  const { username, password, hostname, port } = new URL(original.connectionString)
  const primary = `host=${hostname} port=${port} user=${username} password=${password}`
  await appendFile(
    join(folder, 'postgresql.auto.conf'),
    `primary_conninfo = '${primary}'\nwal_retrieve_retry_interval = '100ms'\n`,
  )
  await writeFile(join(folder, 'standby.signal'), '')
  // What root copies is root's: PostgreSQL wants to own its data.
  const { uid, gid } = await stat(original.folder)
  for (const entry of await readdir(folder, { recursive: true })) await chown(join(folder, entry), uid, gid)
  await chown(folder, uid, gid)
}

const isRunning = ({ exitCode, signalCode }: ChildProcess) => exitCode === null && signalCode === null

/** As pg_ctl does: `standby` is one that lets nobody in, as with `hot_standby=off`. */
async function saysReady(folder: string): Promise<boolean> {
  const lines = (await readFile(join(folder, 'postmaster.pid'), 'utf8').catch(() => '')).split('\n')
  return /^(ready|standby)/.test(lines[7] ?? '')
}

function atPort(connectionString: string, port: number): string {
  return Object.assign(new URL(connectionString), { port: String(port) }).href
}
