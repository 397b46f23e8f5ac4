import { parseArgs } from 'node:util'
import { CONTENDERS, NETWORKS, type Plan, plannedCells, QUICK, SCENARIOS, type Wishes } from './plan.ts'

/** The command line was wrong. Its message is for who typed it. */
export class WrongArguments extends Error {}

/** What to do; undefined when only help was asked for. @throws WrongArguments */
export function readArguments(args: readonly string[]): Plan | undefined {
  const { quick, help, write, ...others } = parse(args)
  if (help) return undefined
  const given = Object.values(others).some((value) => value !== undefined)
  if (quick && given)
    throw new WrongArguments('--quick is a subset of its own: leave out what else says what to measure')
  const wishes: Wishes = quick
    ? QUICK
    : {
        scenarios: names('--scenario', others.scenario, SCENARIOS),
        networks: names('--network', others.network, NETWORKS),
        contenders: names('--contender', others.contender, CONTENDERS),
        rounds: number(
          '--rounds',
          others.rounds,
          (value) => Number.isInteger(value) && value >= 1,
          'a whole number from 1 on',
        ),
        seconds: number('--seconds', others.seconds, (value) => value >= 0.1 && value <= 60, 'a number from 0.1 to 60'),
      }
  const cells = plannedCells(wishes)
  if (cells.length === 0) throw new WrongArguments('Of these nobody takes part in these scenarios')
  const name = quick ? 'quick' : given ? 'custom' : 'full'
  return { name, cells, write: write || name === 'full' }
}

export const HELP = `npm run bench -- [options]

Measures this plugin against others on a PostgreSQL of its own, and writes bench/RESULTS.md and bench/results.svg.
Without options everything, which takes about twenty minutes.

  --quick                a small part of it, within 90 seconds: ${QUICK.scenarios.join(' and ')}; ${QUICK.networks.join(' and ')};
                         ${QUICK.contenders.join(', ')}; ${QUICK.rounds} rounds of ${QUICK.seconds} s
  --scenario <names>     ${list(SCENARIOS)}
  --network <names>      ${list(NETWORKS)}
  --contender <names>    ${wrapped(Object.keys(CONTENDERS))};
                         the one that all are compared with takes part in any case, twice
  --rounds <number>      how often everybody is measured
  --seconds <number>     for how long each time
  --write                writes the results also when not everything was measured
  --help

Names are separated by commas.`

function parse(args: readonly string[]) {
  const text = { type: 'string' } as const
  const flag = { type: 'boolean', default: false } as const
  const options = { scenario: text, network: text, contender: text, rounds: text, seconds: text }
  try {
    return parseArgs({ args: [...args], options: { ...options, quick: flag, write: flag, help: flag } }).values
  } catch (error) {
    throw new WrongArguments(error instanceof Error ? error.message : String(error))
  }
}

function names<T extends object>(
  option: string,
  given: string | undefined,
  known: T,
): (keyof T & string)[] | undefined {
  if (given === undefined) return undefined
  return given.split(',').map((entry) => {
    const name = entry.trim()
    if (!Object.hasOwn(known, name)) throw new WrongArguments(`${option}: there is no "${name}", only ${list(known)}`)
    return name as keyof T & string
  })
}

function number(option: string, given: string | undefined, test: (value: number) => boolean, expected: string) {
  if (given === undefined) return undefined
  const value = Number(given)
  if (given.trim() === '' || !test(value)) throw new WrongArguments(`${option}: expected ${expected}, got "${given}"`)
  return value
}

/** Several lines below each other in the help. */
function wrapped(names: readonly string[]): string {
  const lines = [names.slice(0, 6), names.slice(6)].map((some) => some.join(', '))
  return lines.join(`,\n${' '.repeat(25)}`)
}

function list(known: object): string {
  return Object.keys(known).join(', ')
}
