import { interval, perSecondOf, throughputOf } from './comparison.ts'
import { CONTENDERS, type Contender, type ContenderName, SCENARIOS } from './plan.ts'
import { problemsOf, type Result } from './results.ts'
import { estimate, ratios } from './statistics.ts'
import type { Table } from './table.ts'

const isOurs = (name: ContenderName) => (CONTENDERS[name] as Contender).ours === true

/** Where the plugin stands in each closed loop, in one row each. */
export function standings(results: readonly Result[]): Table {
  const ours: ContenderName[] = ['ours', 'ours-prepared']
  const rows = results.flatMap((result) => {
    const throughput = throughputOf(result)
    if (!throughput) return []
    const { cell } = result
    const best = bestOther(result)
    const numbers = ours.map((name) => (cell.contenders.includes(name) ? interval(throughput.of(name)) : '-'))
    const other = best ? `${interval(throughput.of(best))} ${CONTENDERS[best].title}` : '-'
    const noise = throughput.noise ? interval(throughput.noise) : '-'
    return [{ cells: [`${cell.scenario}, ${cell.network}`, ...numbers, other, noise], ours: false }]
  })
  return {
    title: 'Requests/s as multiples of the baseline',
    columns: ['scenario', ...ours.map((name) => CONTENDERS[name].title), 'fastest other', 'noise'],
    rows,
    notes: ['The baseline is `pg` by hand; of `untouched` it is bare Fastify.'],
  }
}

/** Every cell in which somebody was faster than the plugin as it is by default, or as fast, with what is known of the reason. */
export function whereBehind(results: readonly Result[]): string[] {
  return results.flatMap((result) => {
    const { scenario, network, contenders } = result.cell
    const speeds = perSecondOf(result)
    if (!speeds || !contenders.includes('ours')) return []
    const versus = others(result).map((name) => ({ name, ratio: estimate(ratios(speeds('ours'), speeds(name))) }))
    const faster = versus.filter(({ ratio }) => ratio.high < 1)
    const level = versus.filter(({ ratio }) => ratio.low <= 1 && ratio.high >= 1)
    const list = (some: typeof versus) =>
      some.map(({ name, ratio }) => `${CONTENDERS[name].title} (${interval(ratio)})`)
    const parts = [
      faster.length > 0 ? `behind ${list(faster).join(', ')}` : '',
      level.length > 0 ? `no difference seen to ${list(level).join(', ')}` : '',
    ].filter((part) => part !== '')
    if (parts.length === 0) return []
    return [
      `\`${scenario}\`, ${network}: ${parts.join('; ')}.${reason(
        result,
        faster.map(({ name }) => name),
      )}`,
    ]
  })
}

/** Why others can be ahead. */
function reason({ cell }: Result, faster: readonly ContenderName[]): string {
  if (faster.length === 0 || SCENARIOS[cell.scenario].baseline === 'fastify') return ''
  const reasons = []
  if (cell.network === 'loopback') reasons.push('A round trip costs next to nothing here, so CPU decides.')
  const preparing = faster
    .filter((name) => name === 'postgres' || name === 'pg-named')
    .map((name) => CONTENDERS[name].title)
  if (preparing.length > 0)
    reasons.push(`Prepared statements: ${preparing.join(', ')}; compare with the plugin's own row with them.`)
  return reasons.map((sentence) => ` ${sentence}`).join('')
}

function bestOther(result: Result): ContenderName | undefined {
  const throughput = throughputOf(result)!
  return others(result).sort((a, b) => throughput.of(b).median - throughput.of(a).median)[0]
}

/** Those who are not us, nor there only for comparison, nor wrong. */
function others(result: Result): ContenderName[] {
  const { scenario, contenders } = result.cell
  const { control } = SCENARIOS[scenario]
  return contenders.filter((name) => !isOurs(name) && name !== control && !problemsOf(result).has(name))
}
