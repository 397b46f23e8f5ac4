import { execFile } from 'node:child_process'
import { readFile, readlink, realpath, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { isRunning, signalTo, statusOf } from '../process.ts'

const run = promisify(execFile)

/** PostgreSQL's first process, which all others obey. */
interface Postmaster {
  readonly pid: number
  readonly parent: number
}

/**
 * Ends the server that a killed run left on these data. One whose run is still there is let be: its parent is the
 * process that started it, whereas the parent of an orphan is another.
 */
export async function endLeftover(cluster: string, say: (line: string) => void): Promise<void> {
  const data = join(cluster, 'data')
  const pidFile = join(data, 'postmaster.pid')
  const pid = Number.parseInt(await readFile(pidFile, 'utf8').catch(() => ''), 10)
  if (!Number.isInteger(pid)) return rm(pidFile, { force: true })
  const postmaster = (await isRunning(pid)) ? await findPostmaster(pid, data) : undefined
  if (!postmaster) return disownPidFile(pidFile)
  const owner = Number(await readFile(join(cluster, 'owner.pid'), 'utf8').catch(() => ''))
  if (postmaster.parent === owner)
    throw new Error(`The data in ${cluster} are in use by process ${owner}: stop it, or set DATABASE_URL`)
  say('Stopping the PostgreSQL that a killed run left behind')
  await stopPostmaster(pid)
}

/**
 * PostgreSQL does not start while the process in postmaster.pid is there, even if it is another by now, or a dead one
 * that nobody has collected. Its own parent, this process, it disregards, and still looks for orphaned backends.
 */
async function disownPidFile(file: string): Promise<void> {
  const lines = await readFile(file, 'utf8')
  await writeFile(file, lines.replace(/^\d+/, String(process.pid)))
}

/** A fast shutdown: sessions are ended and everything is written. One that hangs is made to drop everything. */
export async function stopPostmaster(pid: number): Promise<void> {
  for (const signal of ['SIGINT', 'SIGQUIT', 'SIGKILL'] as const) {
    if (!(await isRunning(pid))) return
    signalTo(pid, signal)
    if (await endsWithin(pid, 10_000)) return
  }
  throw new Error(`PostgreSQL (process ${pid}) does not end`)
}

async function endsWithin(pid: number, millis: number): Promise<boolean> {
  const deadline = performance.now() + millis
  while (await isRunning(pid)) {
    if (performance.now() > deadline) return false
    await sleep(20)
  }
  return true
}

async function findPostmaster(pid: number, data: string): Promise<Postmaster | undefined> {
  const status = await statusOf(pid)
  if (status) {
    // A postmaster's working directory is its data folder.
    const [there, here] = await Promise.all([readlink(`/proc/${pid}/cwd`).catch(() => ''), realpath(data)])
    return status.name === 'postgres' && there === here ? { pid, parent: status.parent } : undefined
  }
  const line = await run('ps', ['-o', 'ppid=,command=', '-p', String(pid)]).then(
    ({ stdout }) => stdout.trim(),
    () => '',
  )
  return line.includes('postgres') && line.includes(data) ? { pid, parent: Number.parseInt(line, 10) } : undefined
}
