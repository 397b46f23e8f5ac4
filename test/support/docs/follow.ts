/**
 * Does what a page says, word for word, in an empty folder: node --import=tsx test/support/docs/follow.ts docs/guide.md
 *
 * Files are written, commands are typed, in the page's order, and a `text` block behind a command is what it has to
 * print; `…` stands for anything. Only three things differ: the package is the one packed from this tree, two ports are
 * ones that are free, and root, which PostgreSQL refuses, becomes somebody else.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { chown, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { eventually } from '../eventually.ts'
import { type Block, type Page, readPage } from './page.ts'

const root = fileURLToPath(new URL('../../..', import.meta.url))
const PACKAGE = 'fastify-request-db'
const WITHIN_MILLIS = 300_000
const isRoot = process.getuid?.() === 0
const NOBODY = 65_534
const account = isRoot ? { uid: NOBODY, gid: NOBODY } : {}

// Where there is none. It tells an answer of 400 and more by how it ends, as curl does only when it is asked to.
const CURL = `command -v curl >/dev/null || curl() { node '${join(root, '.ci', 'curl.mjs')}' "$@" || [ $? -eq 22 ]; }`

const folder = await mkdtemp(join(tmpdir(), `${PACKAGE}-guide-`))
const terminals = new Map<string, Terminal>()
let here = folder

/** A command that runs on, and what it has printed. */
interface Terminal {
  readonly child: ChildProcess
  output: string
  isOver: boolean
}

process.once('SIGTERM', () => process.exit(1))
process.once('exit', () => {
  for (const { child, isOver } of terminals.values()) if (!isOver) process.kill(-child.pid!, 'SIGKILL')
})

try {
  const page = await readPage(root, process.argv[2] ?? 'docs/guide.md')
  await follow(page)
  console.log(`${page.name}: ${page.blocks.length} blocks, all as it says`)
} catch (error) {
  console.error(error instanceof Error ? error.message : error)
  for (const [name, { output }] of terminals) console.error(`\n-- ${name}:\n${output.slice(-4000)}`)
  process.exitCode = 1
} finally {
  for (const terminal of [...terminals.values()].reverse()) await stop(terminal)
  await rm(folder, { recursive: true, force: true })
}

async function follow(page: Page): Promise<void> {
  const packed = pack()
  if (isRoot) await chown(folder, NOBODY, NOBODY)
  const ports = new Map(await Promise.all(['3000', '5433'].map(async (port) => [port, await freePort()] as const)))
  const here = (text: string) => text.replaceAll(/\b(?:3000|5433)\b/g, (port) => ports.get(port) ?? port)
  let printed: (expected: string) => Promise<void> = async () => {}
  for (const block of page.blocks) {
    const at = `${page.name}:${block.line}`
    const text = here(block.lines.join('\n'))
    if (block.file !== undefined) await write(block.file, text)
    else if (block.language === 'text') await printed(text).catch(({ message }) => fail(`${at}: ${message}`))
    else if (block.language === 'sh')
      printed = await type(at, text.replace(/(install) fastify-request-db/, `$1 ${packed}`), terminalOf(page, block))
    else fail(`${at}: a block of ${block.language} is neither a file nor a command`)
  }
}

/** The comment above a block whose command goes on running. */
function terminalOf(page: Page, { line }: Block): string | undefined {
  return /^<!-- in (a \w+ terminal) -->$/.exec(page.text.split('\n')[line - 3] ?? '')?.[1]
}

async function write(file: string, text: string): Promise<void> {
  const path = join(here, file)
  await mkdir(dirname(path), { recursive: true })
  await writeFile(path, `${text}\n`)
}

/** Returns how to ask what it printed. */
async function type(
  at: string,
  text: string,
  terminal: string | undefined,
): Promise<(expected: string) => Promise<void>> {
  for (const line of text.split('\n')) console.log(`${at}: ${line}`)
  if (terminal !== undefined) {
    await stop(terminals.get(terminal))
    const running = start(text)
    terminals.set(terminal, running)
    return async (expected) => {
      const says = () => linesOf(expected).every((line) => linesOf(running.output).some((said) => fits(said, line)))
      const describe = () => `${terminal} does not say\n${expected}\nbut\n${running.output}`
      await eventually(() => says() || running.isOver, { withinMillis: WITHIN_MILLIS, describe })
      if (!says()) throw new Error(describe())
    }
  }
  // A folder that is entered stays entered.
  const done = start(`set -e\n${CURL}\n${text}\npwd >&3`)
  const over = await ended(done)
  if (over !== 0) fail(`${at}: ended with ${over}\n${done.output}`)
  here = done.place.trim()
  return async (expected) => {
    if (!fits(done.output.trim(), expected)) throw new Error(`it should print\n${expected}\nbut prints\n${done.output}`)
  }
}

function start(text: string): Terminal & { place: string } {
  // As in a terminal: a process group of its own, which Ctrl-C reaches as a whole.
  const child = spawn('bash', ['-c', text], {
    ...account,
    cwd: here,
    detached: true,
    env: environment(),
    stdio: ['ignore', 'pipe', 'pipe', 'pipe'],
  })
  const terminal = { child, output: '', place: '', isOver: false }
  child.once('exit', () => {
    terminal.isOver = true
  })
  for (const stream of [child.stdout, child.stderr]) stream?.on('data', (data) => (terminal.output += data))
  child.stdio[3]?.on('data', (data: Buffer) => (terminal.place += data))
  return terminal
}

async function ended({ child }: Terminal): Promise<number | null> {
  const late = setTimeout(() => process.kill(-child.pid!, 'SIGKILL'), WITHIN_MILLIS)
  const [code] = (await once(child, 'close')) as [number | null]
  clearTimeout(late)
  return code
}

/** Ctrl-C. */
async function stop(terminal: Terminal | undefined): Promise<void> {
  if (terminal === undefined || terminal.isOver) return
  const gone = ended(terminal)
  process.kill(-terminal.child.pid!, 'SIGINT')
  await gone
}

/** Nothing of what npm, or the account that runs this, has set up. */
function environment(): NodeJS.ProcessEnv {
  const kept = ['PATH', 'LANG', 'TMPDIR', 'NODE_EXTRA_CA_CERTS', 'npm_config_registry', 'HTTP_PROXY', 'HTTPS_PROXY']
  const own = Object.fromEntries(kept.flatMap((name) => (process.env[name] ? [[name, process.env[name]]] : [])))
  return { ...own, HOME: folder, NO_COLOR: '1', npm_config_update_notifier: 'false' }
}

function pack(): string {
  const args = ['pack', '--silent', '--pack-destination', folder]
  const name = execFileSync('npm', args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
  return join(folder, name.trim().split('\n').at(-1) ?? '')
}

async function freePort(): Promise<string> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const address = server.address()
  server.close()
  await once(server, 'close')
  return String(typeof address === 'object' && address?.port)
}

function linesOf(text: string): string[] {
  return text.split('\n')
}

function fits(said: string, expected: string): boolean {
  const parts = expected.split('…').map((part) => part.replaceAll(/[\\^$.*+?()[\]{}|]/g, '\\$&'))
  return new RegExp(`^${parts.join('[^]*')}$`).test(said)
}

function fail(message: string): never {
  throw new Error(message)
}
