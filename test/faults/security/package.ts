import { execFile } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { t } from '../../support/test.ts'

/* What is published is what runs, and what says how. */

const run = promisify(execFile)
const cwd = fileURLToPath(new URL('../../..', import.meta.url))

// Tests run on what `npm test` has built.
const { stdout } = await run('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], { cwd })
const [{ files }] = JSON.parse(stdout) as [{ files: { path: string; mode: number }[] }]
const paths = files.map(({ path }) => path)

t.test('nothing is packed but what is built, the README and the license', async (t) => {
  const others = paths.filter((path) => !path.startsWith('dist/'))
  t.strictSame(others.sort(), ['LICENSE', 'README.md', 'package.json'])
  const kinds = new Set(paths.filter((path) => path.startsWith('dist/')).map((path) => path.replace(/^.*?\./, '')))
  t.strictSame(
    [...kinds].filter((kind) => !['js', 'd.ts', 'css', 'html', 'svg'].includes(kind)),
    [],
  )
})

t.test('nothing that is packed speaks of this machine, or holds a key', async (t) => {
  for (const path of paths) {
    const text = readFileSync(`${cwd}/${path}`, 'utf8')
    t.notMatch(text, /-----BEGIN|npm_[A-Za-z0-9]{20}|\/home\/|\/Users\//, path)
    t.notOk(text.includes(cwd), path)
  }
})

t.test('what it needs is little, and runs nothing when it is installed', async (t) => {
  const { dependencies, scripts } = JSON.parse(readFileSync(`${cwd}/package.json`, 'utf8'))
  t.strictSame(Object.keys(dependencies), ['@fastify/error', '@types/pg', 'fastify-plugin'])
  for (const name of ['preinstall', 'install', 'postinstall', 'prepare']) t.notOk(name in scripts, name)
})
