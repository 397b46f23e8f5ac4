import { readFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { arch, cpus, release, totalmem, type } from 'node:os'
import { dirname, join } from 'node:path'

const PACKAGES = ['fastify', 'pg', 'kysely', '@fastify/postgres', 'postgres', 'autocannon']

/** What the results depend on: the machine and the versions, each with its name. */
export async function machine(postgresVersion: string): Promise<[name: string, value: string][]> {
  const processors = cpus()
  const versions = await Promise.all(PACKAGES.map(async (name) => `${name} ${await versionOf(name)}`))
  return [
    ['CPU', `${processors[0]?.model.trim() ?? 'unknown'}, ${processors.length} cores`],
    ['Memory', `${(totalmem() / 2 ** 30).toFixed(1)} GiB`],
    ['System', `${type()} ${release()}, ${arch()}`],
    ['Node', process.versions.node],
    ['PostgreSQL', postgresVersion],
    ['Packages', versions.join(', ')],
  ]
}

/** Not every package lets its package.json be required: it is looked for above the file that is loaded. */
async function versionOf(name: string): Promise<string> {
  const require = createRequire(import.meta.url)
  let folder = dirname(require.resolve(name))
  for (;;) {
    const text = await readFile(join(folder, 'package.json'), 'utf8').catch(() => '{}')
    const manifest = JSON.parse(text) as { name?: string; version?: string }
    if (manifest.name === name && manifest.version) return manifest.version
    if (folder === dirname(folder)) return 'unknown'
    folder = dirname(folder)
  }
}
