import { execFile } from 'node:child_process'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import t from 'tap'

const compiler = join(dirname(createRequire(import.meta.url).resolve('typescript/package.json')), 'bin/tsc')

/** What tsc says of test/types, a user's project in small; it imports the built package by its name. */
function compile(...flags: string[]): Promise<string> {
  return new Promise((resolve) => {
    execFile(process.execPath, [compiler, '-p', 'test/types', ...flags], (_error, stdout) => resolve(stdout))
  })
}

t.test('the types accept what must compile and refuse what must not, for a strict user of NodeNext', async (t) => {
  t.equal(await compile(), '')
})

t.test('and for a user with a bundler and without exactOptionalPropertyTypes', async (t) => {
  const flags = ['--module', 'preserve', '--moduleResolution', 'bundler', '--exactOptionalPropertyTypes', 'false']
  t.equal(await compile(...flags), '')
})
