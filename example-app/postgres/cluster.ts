import { execFile } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chown, mkdir, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { isRunning } from '../process.ts'
import type { Home } from './home.ts'

const run = promisify(execFile)

/** A database cluster on disk, and what belongs to it. */
export interface Cluster {
  readonly folder: string
  /** PostgreSQL's own: what `-D` wants. */
  readonly data: string
  readonly log: string
  /** Names the process that started the server. */
  readonly owner: string
  readonly password: string
}

/** The cluster of earlier runs, or a new one. */
export async function ensureCluster(home: Home, say: (line: string) => void): Promise<Cluster> {
  const folder = home.cluster
  await removeUnfinished(folder)
  if (!(await stat(folder).catch(() => undefined))) {
    say('Setting up PostgreSQL, this once')
    await makeCluster(home)
  }
  return {
    folder,
    data: join(folder, 'data'),
    log: join(folder, 'postgres.log'),
    owner: join(folder, 'owner.pid'),
    password: await readFile(join(folder, 'password'), 'utf8'),
  }
}

/** Everything is made under another name and renamed when complete, so a killed run leaves no half cluster behind. */
async function makeCluster({ binaries, account, cluster }: Home): Promise<void> {
  const unfinished = `${cluster}.new-${process.pid}`
  const passwordFile = join(unfinished, 'password')
  await mkdir(unfinished, { mode: 0o700 })
  await writeFile(passwordFile, randomBytes(16).toString('hex'), { mode: 0o600 })
  if (account) for (const path of [unfinished, passwordFile]) await chown(path, account.uid, account.gid)
  const args = ['--username=postgres', `--pwfile=${passwordFile}`, '--auth=scram-sha-256', '--encoding=UTF8']
  // The same sorting and messages on every machine, whatever locales it has.
  const locale = ['--locale=C', '--locale-provider=builtin', '--builtin-locale=C.UTF-8']
  try {
    await run(binaries.initdb, ['-D', join(unfinished, 'data'), ...args, ...locale, '--no-sync', '--no-instructions'], {
      ...account,
      cwd: unfinished,
    })
    await rename(unfinished, cluster)
  } catch (error) {
    await rm(unfinished, { recursive: true, force: true })
    const stderr = error instanceof Error && 'stderr' in error ? String(error.stderr) : ''
    const reason = stderr.match(/error: +(.*)/)?.[1] ?? (stderr.trim().split('\n').at(-1) || String(error))
    throw new Error(`PostgreSQL could not be set up: ${reason}`, { cause: error })
  }
}

async function removeUnfinished(cluster: string): Promise<void> {
  const prefix = `${basename(cluster)}.new-`
  for (const name of await readdir(dirname(cluster))) {
    const maker = name.startsWith(prefix) ? Number(name.slice(prefix.length)) : undefined
    if (maker === undefined || (maker !== process.pid && (await isRunning(maker)))) continue
    await rm(join(dirname(cluster), name), { recursive: true, force: true, maxRetries: 10 })
  }
}
