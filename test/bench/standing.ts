import t from 'tap'
import { standings, whereBehind } from '../../bench/standing.ts'
import { readsOf } from './fixtures/reads.ts'

/** Everybody always serves the same number in a second. */
const steady = (perSecond: number) => Array.from({ length: 6 }, () => perSecond)
const SPEEDS = {
  pg: steady(500),
  'pg-again': steady(510),
  kysely: steady(490),
  postgres: steady(700),
  ours: steady(1500),
  'ours-prepared': steady(1600),
}

t.test('each scenario is one row: the plugin, the fastest other, the noise', async (t) => {
  const { rows } = standings([readsOf(SPEEDS)])
  t.strictSame(
    rows.map(({ cells }) => cells),
    [['read, 5ms', '3.00 [3.00, 3.00]', '3.20 [3.20, 3.20]', '1.40 [1.40, 1.40] postgres, begin', '1.02 [1.02, 1.02]']],
  )
})

t.test('who is wrong is not the fastest', async (t) => {
  const { rows } = standings([readsOf({ ...SPEEDS, postgres: steady(9000) }, { wrong: { postgres: 'lost a row' } })])
  t.match(rows[0]?.cells[3], /pg by hand$/)
})

t.test('where nobody is faster there is nothing to explain', async (t) => {
  t.strictSame(whereBehind([readsOf(SPEEDS)]), [])
})

t.test('whoever is faster is named, with the ratio and what is known of the reason', async (t) => {
  const [line, ...others] = whereBehind([readsOf({ ...SPEEDS, ours: steady(560) }, { network: 'loopback' })])
  t.strictSame(others, [])
  t.match(line, '`read`, loopback: behind postgres, begin (0.80 [0.80, 0.80]).')
  t.match(line, 'CPU decides')
  t.match(line, 'Prepared statements: postgres, begin')
})

t.test('whoever is as fast in some rounds is named, too', async (t) => {
  const [line] = whereBehind([readsOf({ ...SPEEDS, postgres: [1400, 1450, 1490, 1520, 1550, 1600] })])
  t.match(line, 'no difference seen to postgres, begin (1.00 [0.94, 1.07])')
  t.notMatch(line, 'behind')
})

t.test('the same code in another process is never somebody ahead', async (t) => {
  t.strictSame(whereBehind([readsOf({ pg: steady(500), 'pg-again': steady(520), ours: steady(505) })]), [])
})
