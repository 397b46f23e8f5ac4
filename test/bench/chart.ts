import t from 'tap'
import { chartOf } from '../../bench/chart.ts'
import { readsOf } from './fixtures/reads.ts'

const SPEEDS = { pg: [500, 400], 'pg-again': [510, 380], kysely: [500, 390], ours: [1500, 1240] }
const KYSELYS_COLOUR = 'fill="#e3bf7a"'

t.test('the chart is a picture that stands for itself', async (t) => {
  const svg = chartOf([readsOf(SPEEDS)])!
  t.match(svg, /^<svg [^>]*>\n<title>Requests per second, relative to hand-written pg<\/title>/)
  t.notMatch(svg, /<style|<script/)
  for (const text of ['this plugin', '5 ms in each direction', '× pg by hand', 'scenario']) t.match(svg, text)
})

t.test('no attribute holds a quote that would end it', async (t) => {
  const svg = chartOf([readsOf(SPEEDS)])!
  const rest = svg.replaceAll(/ [\w:-]+="[^"<]*"/g, '').replaceAll(/<\/?\w+>/g, '')
  t.notMatch(rest, /[<>"]/)
})

t.test('who is wrong is not shown as fast', async (t) => {
  const shapes = (svg: string | undefined) => svg!.split(KYSELYS_COLOUR).length - 1
  const right = chartOf([readsOf(SPEEDS)])
  const wrong = chartOf([readsOf(SPEEDS, { wrong: { kysely: 'lost a row' } })])
  t.equal(shapes(right) - shapes(wrong), 1)
})

t.test('without results there is no chart', async (t) => {
  t.equal(chartOf([]), undefined)
})
