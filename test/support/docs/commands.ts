import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Block, Page } from './page.ts'

const root = fileURLToPath(new URL('../../..', import.meta.url))
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
  name: string
  scripts: Record<string, string>
  devDependencies: Record<string, string>
}

/** A command line of a page. */
export interface Command {
  readonly text: string
  readonly line: number
  readonly module: number
}

export function commandsOf(page: Page): Command[] {
  return page.blocks.filter(({ language }) => language === 'sh').flatMap(commandsOfBlock)
}

function commandsOfBlock({ lines, line, module }: Block): Command[] {
  const commands: Command[] = []
  let begun = ''
  let from = line
  for (const [index, text] of lines.entries()) {
    if (begun === '') from = line + index
    begun += text
    if (begun.endsWith('\\')) begun = begun.slice(0, -1)
    // A quotation may go on in the next line.
    else if ((begun.match(/'/g) ?? []).length % 2 === 1) begun += '\n'
    else {
      const command = begun.trim()
      if (command !== '' && !command.startsWith('#')) commands.push({ text: command, line: from, module })
      begun = ''
    }
  }
  return commands
}

/** What a page may tell its readers to type, and what is checked of it; the answer is what is wrong. */
const KNOWN: readonly (readonly [RegExp, (command: string) => string | undefined | Promise<string | undefined>])[] = [
  [/^npm (?:install|i) (.+)$/, (command) => unknownPackage(command)],
  [/^npm (ci|test|start|init -y)$/, () => undefined],
  [/^npm run (\S+)/, (command) => unknownScript(command.split(' ')[2] ?? '')],
  [/^npx fastify-request-db /, (command) => run([join(root, 'dist', 'bin.js'), ...command.split(' ').slice(2)])],
  [/^npx kysely-codegen\b/, () => undefined],
  // Run against the page's own app.
  [/^curl /, () => undefined],
  // Run with the page, or by `tests` of its module.
  [/^(\w+=\S+ )*node --import=tsx (--test )?[\w./'*-]+$/, () => undefined],
  [/^(psql|docker run|pgbouncer|export|cd|mkdir) /, () => undefined],
]

/** What is wrong with it; undefined when nothing is. */
export async function checkCommand({ text }: Command): Promise<string | undefined> {
  const [, check] = KNOWN.find(([pattern]) => pattern.test(text)) ?? []
  return check === undefined ? 'is no command that pages use' : check(text)
}

function unknownPackage(command: string): string | undefined {
  const names = command
    .split(' ')
    .slice(2)
    .filter((name) => !name.startsWith('-'))
    .map((name) => name.replace(/(.)@[^@]*$/, '$1'))
  const unknown = names.filter((name) => name !== manifest.name && !existsSync(join(root, 'node_modules', name)))
  return unknown.length > 0 ? `installs ${unknown.join(', ')}, which nothing here was tried with` : undefined
}

const unknownScript = (name: string) => (name in manifest.scripts ? undefined : `there is no script ${name}`)

/**
 * A request as the page shows it, to the app that the page made. It is fine when it succeeds, or is answered as a comment
 * behind it says: `curl … # 409`.
 */
export async function curl(command: Command, urls: readonly string[]): Promise<string | undefined> {
  const [url] = urls.slice(-1)
  if (url === undefined) return 'nothing of the page listens on port 3000'
  const [text = '', expected] = command.text.replaceAll(ADDRESS, url).split(/ # (?=\d{3}$)/)
  const { target, ...options } = requestOf(words(text).slice(1))
  const response = await fetch(target, { ...options, redirect: 'manual' })
  const isFine = expected === undefined ? response.status < 400 : response.status === Number(expected)
  return isFine ? undefined : `was answered ${response.status}: ${await response.text()}`
}

const ADDRESS = /(http:\/\/)?(localhost|127\.0\.0\.1):3000/g

function requestOf(args: string[]) {
  const request = { target: '', method: 'GET', headers: {} as Record<string, string> }
  const body: { body?: string } = {}
  while (args.length > 0) {
    const arg = args.shift() ?? ''
    if (arg === '-X') request.method = args.shift() ?? ''
    else if (arg === '-H') {
      const [name = '', ...value] = (args.shift() ?? '').split(':')
      request.headers[name] = value.join(':').trim()
    } else if (arg === '-d' || arg === '--json') {
      body.body = args.shift() ?? ''
      if (request.method === 'GET') request.method = 'POST'
      if (arg === '--json') request.headers['content-type'] = 'application/json'
    } else if (!arg.startsWith('-')) request.target = arg
  }
  return { ...request, ...body }
}

const words = (command: string) =>
  Array.from(
    command.matchAll(/'([^']*)'|"([^"]*)"|(\S+)/g),
    ([, single, double, bare]) => single ?? double ?? bare ?? '',
  )

function run(args: string[]): Promise<string | undefined> {
  return new Promise((resolve) => {
    const child = execFile(process.execPath, args, { cwd: root }, (_error, stdout, stderr) => {
      resolve(child.exitCode === 0 ? undefined : `ended with ${child.exitCode}\n${stdout}${stderr}`)
    })
  })
}
