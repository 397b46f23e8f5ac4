import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { chmod, cp, lstat, mkdir, readdir, rename, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname, join, relative } from 'node:path'
import { promisify } from 'node:util'
import { type Account, serverAccount } from './account.ts'
import { type Binaries, findBinaries } from './binaries.ts'

const run = promisify(execFile)

/** What a server needs on this machine: programs it can run, a place it can write to, a user who may do both. */
export interface Home {
  readonly binaries: Binaries
  readonly account: Account | undefined
  /** The cluster is here, or will be. One for each major version, since they cannot read each other's. */
  readonly cluster: string
}

export async function findHome(folder: string, say: (line: string) => void): Promise<Home> {
  const binaries = await findBinaries()
  await mkdir(folder, { recursive: true })
  const { stdout } = await run(binaries.postgres, ['--version'])
  const version = stdout.match(/\d\S*/)?.[0] ?? 'unknown'
  const cluster = join(folder, String(Number.parseInt(version, 10)))
  const account = await serverAccount(cluster)
  if (!account || (await canWorkThere(account, folder, binaries))) return { binaries, account, cluster }
  return moveToTemporaryFolder({ binaries, account, cluster }, version, say)
}

/** Root's projects often sit below a folder, such as /root, that the user postgres may not pass. */
async function canWorkThere(account: Account, folder: string, binaries: Binaries): Promise<boolean> {
  const as = { ...account, cwd: '/' }
  try {
    await run(binaries.postgres, ['--version'], as)
    await run('/bin/sh', ['-c', 'cd -- "$0"', folder], as)
    return true
  } catch {
    return false
  }
}

async function moveToTemporaryFolder(home: Home, version: string, say: (line: string) => void): Promise<Home> {
  const folder = dirname(home.cluster)
  const place = join(tmpdir(), `fastify-request-db-${createHash('sha256').update(folder).digest('hex').slice(0, 12)}`)
  say(`The user postgres may not enter ${folder}: PostgreSQL and its data are in ${place}`)
  await makeOwnFolder(place)
  const binaries = await copyBinaries(home.binaries, place, `postgresql-${version}`)
  const cluster = join(place, basename(home.cluster))
  const account = await serverAccount(cluster)
  if (account && !(await canWorkThere(account, place, binaries)))
    throw new Error(
      `The user postgres may enter neither ${folder} nor ${place}: set TMPDIR, DATABASE_URL or another user`,
    )
  return { binaries, account, cluster }
}

/** Anybody may write to the temporary folder, so what is there already is used only if it is ours. */
async function makeOwnFolder(place: string): Promise<void> {
  await mkdir(place, { recursive: true })
  const found = await lstat(place)
  if (!found.isDirectory() || found.uid !== process.getuid?.())
    throw new Error(`${place} belongs to somebody else: delete it`)
  await chmod(place, 0o755)
}

async function copyBinaries(binaries: Binaries, place: string, name: string): Promise<Binaries> {
  const root = join(place, name)
  if (!(await lstat(root).catch(() => undefined))) {
    // Other versions, and what a killed run has not finished.
    const others = (await readdir(place)).filter((entry) => entry.startsWith('postgresql-'))
    for (const other of others) await rm(join(place, other), { recursive: true, force: true })
    const unfinished = `${root}.new-${process.pid}`
    await cp(binaries.root, unfinished, { recursive: true, verbatimSymlinks: true })
    await letAllRead(unfinished)
    await rename(unfinished, root)
  }
  const moved = (program: string) => join(root, relative(binaries.root, program))
  return { root, postgres: moved(binaries.postgres), initdb: moved(binaries.initdb) }
}

async function letAllRead(folder: string): Promise<void> {
  await chmod(folder, 0o755)
  for (const entry of await readdir(folder, { withFileTypes: true, recursive: true })) {
    const path = join(entry.parentPath, entry.name)
    if (entry.isDirectory()) await chmod(path, 0o755)
    else if (entry.isFile()) await chmod(path, basename(entry.parentPath) === 'bin' ? 0o755 : 0o644)
  }
}
