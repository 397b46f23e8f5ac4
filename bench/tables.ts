import { Comparison, interval } from './comparison.ts'
import type { ClosedTurn } from './methods/closed-loop.ts'
import type { OverloadTurn } from './methods/overload.ts'
import type { SlowTurn } from './methods/slow-readers.ts'
import { CONTENDERS, type Contender, type ContenderName, type PlannedCell, SCENARIOS } from './plan.ts'
import { problemsOf, type Result } from './results.ts'
import type { Measured } from './rounds.ts'
import { estimate, quantiles, ratios } from './statistics.ts'
import type { Row, Table } from './table.ts'

/** The table of one scenario on one network. */
export function tableOf(result: Result): Table {
  const { cell } = result
  const table = contentsOf(result)
  return {
    title: `${cell.scenario}, ${cell.network}`,
    columns: ['contender', ...table.columns],
    rows: cell.contenders.map((name) => rowOf(name, table.numbersOf(name), problemsOf(result).has(name))),
    notes: [...table.notes, ...confidence(cell), ...complaints(result)],
  }
}

interface Contents {
  readonly columns: readonly string[]
  numbersOf(contender: ContenderName): string[]
  readonly notes: readonly string[]
}

function contentsOf(result: Result): Contents {
  switch (result.method) {
    case 'closed loop':
      return closedLoop(result.cell, result.measured, result.roundTripMillis)
    case 'slow readers':
      return slowReaders(result.cell, result.measured)
    case 'overload':
      return overload(result.cell, result.measured)
  }
}

function closedLoop(cell: PlannedCell, { turns, bare }: Measured<ClosedTurn>, roundTripMillis: number): Contents {
  const of = (name: ContenderName, key: 'perSecond' | 'cpuMicros' | 'errors') =>
    turns.get(name)!.map((turn) => turn[key])
  const throughput = new Comparison(cell, (name) => of(name, 'perSecond'))
  const cpu = new Comparison(cell, (name) => of(name, 'cpuMicros'))
  const { title } = CONTENDERS[SCENARIOS[cell.scenario].baseline]
  const efficiency = bare.length > 0 ? ['efficiency'] : []
  return {
    columns: ['requests/s', `× ${title}`, 'p50 ms', 'p99 ms', 'CPU µs', '× CPU', ...efficiency, 'errors'],
    numbersOf: (name) => [
      whole(estimate(of(name, 'perSecond')).median),
      versus(cell, name, throughput),
      ...times(turns.get(name)!.map((turn) => turn.times)),
      whole(estimate(of(name, 'cpuMicros')).median),
      versus(cell, name, cpu),
      ...efficiency.map(() => estimate(ratios(of(name, 'perSecond'), bare)).median.toFixed(2)),
      whole(sum(of(name, 'errors'))),
    ],
    notes: [
      ...bareNote(bare, roundTripMillis),
      ...loadNote(turns),
      ...noiseOf('requests/s', throughput),
      ...noiseOf('CPU', cpu),
    ],
  }
}

function slowReaders(cell: PlannedCell, { turns }: Measured<SlowTurn>): Contents {
  const of = (name: ContenderName) => turns.get(name)!
  const perSecond = (name: ContenderName, which: 'alone' | 'inCompany') =>
    whole(estimate(of(name).map((turn) => turn[which].perSecond)).median)
  const p99 = (name: ContenderName, which: 'alone' | 'inCompany') =>
    times(of(name).map((turn) => turn[which].times))[1]!
  return {
    columns: ['requests/s alone', 'beside slow readers', 'p99 ms alone', 'beside slow readers', '× alone', 'errors'],
    numbersOf: (name) => [
      perSecond(name, 'alone'),
      perSecond(name, 'inCompany'),
      p99(name, 'alone'),
      p99(name, 'inCompany'),
      interval(estimate(of(name).map(({ ratio }) => ratio))),
      whole(sum(of(name).map(({ errors }) => errors))),
    ],
    notes: [`Only reads are counted. ${cell.rounds} rounds.`],
  }
}

function overload(cell: PlannedCell, { turns }: Measured<OverloadTurn>): Contents {
  const of = (name: ContenderName) => turns.get(name)!
  const median = (name: ContenderName, key: 'goodput' | 'refusedShare') =>
    estimate(of(name).map((turn) => turn[key])).median
  const p99 = (name: ContenderName, key: 'refused' | 'besideAlone' | 'beside') =>
    times(of(name).map((turn) => turn[key]))[1]!
  return {
    columns: [
      'goodput/s',
      'p50 ms',
      'p99 ms',
      'refused',
      'p99 ms of refusals',
      'no database: p99 ms alone',
      'beside',
      '× alone',
      'errors',
    ],
    numbersOf: (name) => [
      whole(median(name, 'goodput')),
      ...times(of(name).map(({ served }) => served)),
      `${whole(100 * median(name, 'refusedShare'))} %`,
      p99(name, 'refused'),
      p99(name, 'besideAlone'),
      p99(name, 'beside'),
      interval(estimate(of(name).map(({ ratio }) => ratio))),
      whole(sum(of(name).map(({ errors }) => errors))),
    ],
    notes: [
      `Times are of requests that were answered while the load lasted, from when they were due: where nothing is refused, the queue grows, and they with it. ${cell.rounds} rounds of ${cell.seconds} s.`,
    ],
  }
}

function rowOf(name: ContenderName, numbers: readonly string[], wrong: boolean): Row {
  const { title, ours = false }: Contender = CONTENDERS[name]
  return { cells: [wrong ? `WRONG: ${title}` : title, ...numbers], ours }
}

function versus({ scenario }: PlannedCell, name: ContenderName, comparison: Comparison): string {
  if (name === SCENARIOS[scenario].baseline) return '1'
  return `${interval(comparison.of(name))}${comparison.isNoise(name) ? ' ≈' : ''}`
}

/** p50 and p99 of all rounds' times together. */
function times(rounds: readonly Float64Array[]): string[] {
  return quantiles(rounds, 0.5, 0.99).map((millis) => (Number.isNaN(millis) ? '-' : millis.toFixed(2)))
}

function noiseOf(what: string, { noise }: Comparison): string[] {
  return noise ? [`Noise of ${what}: the same code in another process is at ${interval(noise)}.`] : []
}

function bareNote(bare: readonly number[], roundTripMillis: number): string[] {
  if (bare.length === 0) return []
  const { median } = estimate(bare)
  return [
    `20 connections with nothing but \`select 1\`: ${whole(median)}/s; one alone: ${roundTripMillis.toFixed(2)} ms each.`,
  ]
}

/** Said where the load generator may have been what could not go any faster. */
function loadNote(turns: ReadonlyMap<ContenderName, readonly ClosedTurn[]>): string[] {
  const most = Math.max(...[...turns.values()].flat().map(({ loadCpu }) => loadCpu))
  if (most < 0.75) return []
  return [
    `The load generator needed up to ${whole(100 * most)} % of a core: it limits these requests/s, so compare CPU.`,
  ]
}

function confidence({ rounds }: PlannedCell): string[] {
  const { level } = estimate(Array.from({ length: rounds }, () => 1))
  return [`[…] holds the median with ${(100 * level).toFixed(1)} % (${rounds} rounds); ≈ lies within the noise.`]
}

function complaints(result: Result): string[] {
  return [...problemsOf(result)].map(([name, problems]) => `WRONG: ${CONTENDERS[name].title}: ${problems[0]}`)
}

function whole(value: number): string {
  return value.toLocaleString('en-US', { maximumFractionDigits: 0 })
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0)
}
