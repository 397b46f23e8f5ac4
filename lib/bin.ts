#!/usr/bin/env node
import { parseArgs } from 'node:util'
import { type Plan, plan } from './plan.ts'

interface Option {
  readonly shows: string
  readonly means: string
  readonly takes: string
  /** Undefined where it has to be given. */
  readonly or: string | undefined
  /** Undefined where the text is none of what it takes. */
  read(text: string): number | undefined
}

const MOST = 1_000_000
const LONGEST_MILLIS = 2 ** 31 - 1

const whole = (least: number) => ({
  takes: `a whole number from ${least} to ${MOST}`,
  read: (text: string) => (/^\d+$/.test(text) && isWithin(Number(text), least, MOST) ? Number(text) : undefined),
})
const rate = {
  takes: `a number above 0 and up to ${MOST}, such as 500 or 0.5`,
  read: (text: string) => (/^\d*\.?\d+$/.test(text) && isWithin(Number(text), 1e-6, MOST) ? Number(text) : undefined),
}
const duration = (least: number) => ({
  takes: `a duration ${least > 0 ? 'above 0' : 'from 0'} such as 12ms, 0.5s, or 12 for milliseconds`,
  read: (text: string) => {
    const [, number, unit] = /^(\d*\.?\d+)(ms|s)?$/.exec(text) ?? []
    if (number === undefined) return undefined
    const millis = Number(number) * (unit === 's' ? 1000 : 1)
    return isWithin(millis, least, LONGEST_MILLIS) ? millis : undefined
  },
})
const isWithin = (number: number, least: number, most: number) => number >= least && number <= most

const OPTIONS: Record<string, Option> = {
  rate: { shows: '500', means: 'requests a second that use the database, over all workers', or: undefined, ...rate },
  hold: { shows: '12ms', means: 'how long one holds its connection, on average', or: undefined, ...duration(0.001) },
  workers: { shows: '2', means: 'processes that run the app', or: '1', ...whole(1) },
  size: { shows: '16', means: 'pool.size', or: '10', ...whole(1) },
  overflow: { shows: '4', means: 'pool.maxOverflow', or: '0', ...whole(0) },
  timeout: { shows: '10s', means: 'pool.timeoutMillis', or: '10s', ...duration(0) },
  'max-connections': { shows: '100', means: "the server's max_connections", or: '100', ...whole(1) },
  reserved: { shows: '3', means: 'of these, reserved for superusers and the like', or: '3', ...whole(0) },
  others: { shows: '0', means: 'of these, used by other apps and people', or: '0', ...whole(0) },
}

const EXAMPLE =
  'fastify-request-db plan --workers 2 --size 16 --overflow 4 --rate 500 --hold 12ms --max-connections 100'

const HELP = [
  'Does the pool suit the load, and the server the pools?',
  '',
  `  ${EXAMPLE}`,
  '',
  ...Object.entries(OPTIONS).map(([name, { shows, means, or }]) => {
    const otherwise = or === undefined ? 'has to be given' : `default ${or}`
    return `  ${`--${name} ${shows}`.padEnd(24)}${means} (${otherwise})`
  }),
  '',
  'Durations: 12ms, 0.5s, or a plain number of milliseconds.',
]

class Misuse extends Error {}

/** What the command line asks for, as lines. @throws Misuse */
function run(args: string[]): string[] {
  const options = Object.fromEntries(Object.keys(OPTIONS).map((name) => [name, { type: 'string' as const }]))
  const { values, positionals } = parseArgs({
    args,
    // Its own errors do not say what an option takes.
    strict: false,
    allowPositionals: true,
    options: { ...options, help: { type: 'boolean', short: 'h' } },
  })
  const [command, ...surplus] = positionals
  if (values.help || command === 'help') return HELP
  if (command !== 'plan')
    throw new Misuse(`${command === undefined ? 'no command' : `'${command}'`}: there is one, plan`)
  const unknown = Object.keys(values).find((name) => !Object.hasOwn(OPTIONS, name))
  if (unknown !== undefined) {
    throw new Misuse(
      `--${unknown}: there is no such option, but ${Object.keys(OPTIONS)
        .map((name) => `--${name}`)
        .join(', ')}`,
    )
  }
  const input = planOf((name) => read(name, values[name]))
  if (surplus.length > 0) throw new Misuse(`'${surplus[0]}' belongs to no option`)
  return plan(input)
}

function read(name: string, value: unknown): number {
  const { or, takes, read } = OPTIONS[name]!
  const text = value ?? or
  if (text === undefined) throw new Misuse(`--${name} is missing: it takes ${takes}`)
  const number = typeof text === 'string' ? read(text) : undefined
  if (number !== undefined) return number
  throw new Misuse(`--${name} got ${typeof text === 'string' ? `'${text}'` : 'no value'}: it takes ${takes}`)
}

const planOf = (number: (name: string) => number): Plan => ({
  ratePerSecond: number('rate'),
  holdMillis: number('hold'),
  processes: number('workers'),
  size: number('size'),
  maxOverflow: number('overflow'),
  timeoutMillis: number('timeout'),
  maxConnections: number('max-connections'),
  reserved: number('reserved'),
  others: number('others'),
})

try {
  process.stdout.write(`${run(process.argv.slice(2)).join('\n')}\n`)
} catch (error) {
  if (!(error instanceof Misuse)) throw error
  process.stderr.write(`fastify-request-db: ${error.message}\nTry fastify-request-db plan --help, or\n  ${EXAMPLE}\n`)
  process.exitCode = 2
}
