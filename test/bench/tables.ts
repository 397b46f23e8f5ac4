import t from 'tap'
import { problemsOf } from '../../bench/results.ts'
import { tableOf } from '../../bench/tables.ts'
import { readsOf } from './fixtures/reads.ts'

const SPEEDS = {
  pg: [500, 400, 500],
  'pg-again': [510, 380, 500],
  kysely: [500, 390, 505],
  ours: [1500, 1240, 1600],
}
const LOSS = 'acknowledged 7 rows, of which 6 are in the database'

t.test('a row has what was measured, and how it compares', async (t) => {
  const { title, rows } = tableOf(readsOf(SPEEDS))
  t.equal(title, 'read, 5ms')
  t.match(rows[0]!.cells, ['pg by hand', '500', '1', '1.88', '2.50', '100', '1', '0.25', '0'])
  t.match(rows[2]!.cells, ['Kysely, transaction()', '500', '1.00 [0.97, 1.01] ≈'])
  t.match(rows[3], { ours: true, cells: ['this plugin', '1,500', '3.10 [3.00, 3.20]'] })
})

t.test('it says how noisy it was, and how sure the intervals are', async (t) => {
  const { notes } = tableOf(readsOf(SPEEDS))
  t.match(notes, ['20 connections with nothing but `select 1`: 2,000/s; one alone: 11.00 ms each.'])
  t.match(notes.join('\n'), 'Noise of requests/s: the same code in another process is at 1.00 [0.95, 1.02].')
  t.match(notes.join('\n'), '75.0 % (3 rounds)')
})

t.test('who is wrong is shown as wrong', async (t) => {
  const result = readsOf(SPEEDS, { wrong: { kysely: LOSS } })
  t.same([...problemsOf(result)], [['kysely', [LOSS]]])
  const { rows, notes } = tableOf(result)
  t.equal(rows[2]!.cells[0], 'WRONG: Kysely, transaction()')
  t.equal(notes.at(-1), `WRONG: Kysely, transaction(): ${LOSS}`)
})
