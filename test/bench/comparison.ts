import t from 'tap'
import { Comparison, interval } from '../../bench/comparison.ts'
import type { ContenderName, PlannedCell } from '../../bench/plan.ts'

const cell: PlannedCell = {
  scenario: 'read',
  network: '5ms',
  contenders: ['pg', 'pg-again', 'kysely', 'ours'],
  rounds: 3,
  seconds: 1,
}
const values: Partial<Record<ContenderName, number[]>> = {
  // The second round fell into a hole of the machine.
  pg: [100, 50, 100],
  'pg-again': [105, 50, 95],
  kysely: [98, 48, 98],
  ours: [300, 151, 310],
}
const comparison = new Comparison(cell, (name) => values[name] ?? [])

t.test('each round is compared with the same round of the baseline', async (t) => {
  t.match(comparison.of('ours'), { median: 3.02, low: 3, high: 3.1 })
  t.match(comparison.of('pg'), { median: 1, low: 1, high: 1 })
})

t.test('the noise is what the same code in another process shows', async (t) => {
  t.match(comparison.noise, { median: 1, low: 0.95, high: 1.05 })
})

t.test('what lies within the noise is no difference', async (t) => {
  t.equal(comparison.isNoise('kysely'), true)
  t.equal(comparison.isNoise('ours'), false)
})

t.test('a ratio is written with its interval', async (t) => {
  t.equal(interval(comparison.of('ours')), '3.02 [3.00, 3.10]')
})

t.test('a control that is off itself does not make the plugin look better', async (t) => {
  const lopsided: typeof values = { ...values, 'pg-again': [110, 54, 112], ours: [104, 52, 104] }
  const shifted = new Comparison(cell, (name) => lopsided[name] ?? [])
  t.match(shifted.noise, { low: 1.08, high: 1.12 })
  t.equal(shifted.isNoise('ours'), true, 'between 1 and the control')
})

t.test('without a control nothing is called noise', async (t) => {
  const { contenders, ...others } = cell
  const alone = new Comparison(
    { ...others, contenders: contenders.filter((name) => name !== 'pg-again') },
    (name) => values[name] ?? [],
  )
  t.equal(alone.noise, undefined)
  t.equal(alone.isNoise('pg'), false)
})
