import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { compile } from '../compiler.ts'
import type { PageModule } from './module.ts'

const root = fileURLToPath(new URL('../../..', import.meta.url))
const program = fileURLToPath(new URL('run-module.ts', import.meta.url))

/** Longer than any page takes on the slowest machine: who is still there then does not end by itself. */
const END_WITHIN_MILLIS = 60_000

/** A folder with the module's files, where the package finds itself by name. */
export async function writeModule(
  { page, number, files }: PageModule,
  connectionString: string,
  types = '',
): Promise<string> {
  const folder = join(root, '.tap', 'docs', page, String(number))
  await rm(folder, { recursive: true, force: true })
  for (const [file, source] of files) {
    await mkdir(dirname(join(folder, file)), { recursive: true })
    await writeFile(join(folder, file), source.replaceAll(/'postgres:\/\/[^']+'/g, `'${connectionString}'`))
  }
  await writeFile(join(folder, 'given.ts'), `${types}\nexport {}\n`)
  const tsconfig = {
    extends: join(root, 'tsconfig.json'),
    // A page shows what a call returns and does nothing with it.
    compilerOptions: { noUnusedLocals: false, noUnusedParameters: false },
    include: ['**/*.ts'],
  }
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify(tsconfig))
  return folder
}

/** What the compiler says of it, by page and line; nothing when all is well. */
export async function compileModule(module: PageModule, folder: string): Promise<string> {
  return onThePage(module, folder, await compile(folder))
}

/**
 * Runs what nobody imports, and `visit` with the addresses of the apps that listen then. Resolves with what went
 * wrong, by page and line; nothing when all is well.
 */
export async function runModule(
  module: PageModule,
  folder: string,
  env: NodeJS.ProcessEnv,
  visit: (urls: string[]) => Promise<string[]>,
): Promise<string[]> {
  const wrong: string[] = []
  const failed = (child: Ended) => [onThePage(module, folder, `${module.page}: ${child.why}\n${child.output}`)]
  if (module.entries.length > 0) {
    const files = module.entries.map((file) => join(folder, file))
    // What stands outside of a test file may leave its app open: there is nothing to close it in.
    const child = start(['--test-force-exit', program, ...files], folder, env)
    const ended = endOf(child)
    const urls = await Promise.race([once(child, 'message').then(([urls]) => urls as string[]), ended])
    if (Array.isArray(urls)) {
      wrong.push(...(await visit(urls)))
      child.disconnect()
    }
    const end = await ended
    if (end.why !== undefined) wrong.push(...failed(end))
  }
  for (const file of module.tests) {
    const end = await endOf(start([join(folder, file)], folder, env))
    if (end.why !== undefined) wrong.push(...failed(end))
  }
  return wrong
}

interface Ended {
  readonly why: string | undefined
  readonly output: string
}

function start(args: string[], cwd: string, env: NodeJS.ProcessEnv): ChildProcess {
  // Without the loaders that a test runner gives to what its tests start.
  const { NODE_OPTIONS: _, ...own } = process.env
  return spawn(process.execPath, ['--enable-source-maps', '--import=tsx', ...args], {
    cwd,
    env: { ...own, ...env },
    stdio: ['ignore', 'pipe', 'pipe', 'ipc'],
  })
}

async function endOf(child: ChildProcess): Promise<Ended> {
  let isLate = false
  const late = setTimeout(() => {
    isLate = true
    child.kill('SIGKILL')
  }, END_WITHIN_MILLIS)
  const [out, errors, [code]] = await Promise.all([text(child.stdout!), text(child.stderr!), once(child, 'exit')])
  clearTimeout(late)
  const why = isLate ? 'it did not end' : code === 0 ? undefined : `it ended with ${code}`
  return { why, output: out + errors }
}

/** The module's files have the page's lines: only the name has to be put back. */
function onThePage({ page, files }: PageModule, folder: string, said: string): string {
  let told = said.replaceAll(`file://${folder}/`, '').replaceAll(`${folder}/`, '')
  const inTap = `${folder.slice(root.length)}/`
  told = told.replaceAll(inTap, '')
  for (const file of files.keys()) {
    told = told
      .replaceAll(new RegExp(`${file.replaceAll('.', '\\.')}\\((\\d+),\\d+\\)`, 'g'), `${page}:$1 (${file})`)
      .replaceAll(new RegExp(`${file.replaceAll('.', '\\.')}:(\\d+)(:\\d+)?`, 'g'), `${page}:$1 (${file})`)
  }
  return told
}
