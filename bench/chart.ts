import { type CustomSeriesRenderItem, type EChartsOption, init } from 'echarts'
import { throughputOf } from './comparison.ts'
import {
  CONTENDERS,
  type Contender,
  type ContenderName,
  type NetworkName,
  SCENARIOS,
  type ScenarioName,
} from './plan.ts'
import { problemsOf, type Result } from './results.ts'

const TITLE = 'Requests per second, relative to hand-written pg'
const WIDTH = 1000
const PANEL_HEIGHT = 210
const PANEL_GAP = 62
const TOP = 130
// It goes into an attribute, so without names in quotes.
const FONT = 'system-ui, -apple-system, Roboto, Helvetica, Arial, sans-serif'
const INK = '#24292f'
const LINES = '#d0d7de'

/** Ours are blue. */
const COLOURS: Partial<Record<ContenderName, string>> = {
  'pg-again': '#c8c8c8',
  'pg-named': '#8f8f8f',
  kysely: '#e3bf7a',
  'fastify-postgres': '#cf8f5a',
  postgres: '#8aa878',
  ours: '#2f74c9',
  'ours-prepared': '#123c78',
  'ours-on-response': '#8dbbea',
}

/** The delayed networks first: that is where the round trips are. */
const PANELS: Partial<Record<NetworkName, string>> = {
  '5ms': '5 ms in each direction',
  '1ms': '1 ms in each direction',
  loopback: 'loopback',
}

interface Panel {
  readonly title: string
  readonly scenarios: readonly ScenarioName[]
  readonly results: readonly Result[]
}

/** Requests per second as multiples of the baseline's, with their intervals; undefined if there is nothing to show. */
export function chartOf(results: readonly Result[]): string | undefined {
  const shown = results.filter(
    ({ method, cell }) => method === 'closed loop' && SCENARIOS[cell.scenario].baseline === 'pg',
  )
  const panels = Object.entries(PANELS).flatMap(([network, title]) => {
    const here = shown.filter(({ cell }) => cell.network === network)
    return here.length > 0 ? [{ title, results: here, scenarios: here.map(({ cell }) => cell.scenario) }] : []
  })
  if (panels.length === 0) return undefined
  const height = TOP + panels.length * (PANEL_HEIGHT + PANEL_GAP)
  const chart = init(null, null, { renderer: 'svg', ssr: true, width: WIDTH, height })
  chart.setOption(options(panels))
  const svg = chart.renderToSVGString()
  chart.dispose()
  // It is a picture, in which nothing changes under the mouse, and which is read aloud by its title.
  return `${svg.replace(/\s*<style.*<\/style>/s, '').replace('>', `>\n<title>${TITLE}</title>`)}\n`
}

function options(panels: readonly Panel[]): EChartsOption {
  const contenders = (Object.keys(COLOURS) as ContenderName[]).filter((name) =>
    panels.some(({ results }) => results.some(({ cell }) => cell.contenders.includes(name))),
  )
  const max = Math.ceil(2 * Math.max(...panels.flatMap(({ results }) => results.flatMap(highest)))) / 2
  const top = (index: number) => TOP + index * (PANEL_HEIGHT + PANEL_GAP)
  return {
    animation: false,
    backgroundColor: '#ffffff',
    textStyle: { fontFamily: FONT, color: INK, fontSize: 13 },
    title: [
      {
        text: TITLE,
        left: 'center',
        top: 14,
        textStyle: { color: INK, fontSize: 18 },
      },
      ...panels.map(({ title }, index) => ({
        text: title,
        left: 60,
        top: top(index) - 30,
        textStyle: { color: INK, fontSize: 14 },
      })),
    ],
    legend: contenders.map(legendAt),
    grid: panels.map((_, index) => ({ left: 60, right: 40, top: top(index), height: PANEL_HEIGHT })),
    xAxis: panels.map((panel, index) => scenarioAxis(panel, index, index === panels.length - 1)),
    yAxis: panels.map((_, index) => ratioAxis(index, max)),
    series: panels.flatMap((panel, index) => [
      ...contenders.map((name, place) => bars(panel, index, name, place, contenders.length)),
      lineAtOne(panel, index),
    ]),
  }
}

function scenarioAxis({ scenarios }: Panel, gridIndex: number, named: boolean) {
  return {
    type: 'category' as const,
    gridIndex,
    data: [...scenarios],
    name: named ? 'scenario' : '',
    nameLocation: 'middle' as const,
    nameGap: 32,
    nameTextStyle: { color: INK, fontSize: 13 },
    axisTick: { show: false },
    axisLine: { lineStyle: { color: LINES } },
    axisLabel: { color: INK, fontSize: 14 },
  }
}

/** `max` is the same for all of them, so that bars can be compared between networks. */
function ratioAxis(gridIndex: number, max: number) {
  return {
    type: 'value' as const,
    gridIndex,
    max,
    name: '× pg by hand',
    nameLocation: 'middle' as const,
    nameGap: 36,
    nameTextStyle: { color: INK, fontSize: 13 },
    axisLabel: { color: INK, fontSize: 12, formatter: (value: number) => value.toFixed(1) },
    splitLine: { lineStyle: { color: LINES } },
  }
}

/** One for each contender, in columns that are wide enough for whatever font they are shown in. */
function legendAt(name: ContenderName, index: number) {
  return {
    left: 55 + (index % 4) * 232,
    top: 46 + Math.floor(index / 4) * 24,
    itemWidth: 14,
    itemHeight: 14,
    textStyle: { color: INK, fontSize: 13 },
    data: [{ name: CONTENDERS[name].title, icon: 'rect' }],
  }
}

type Series = Extract<EChartsOption['series'], readonly unknown[]>[number]

function highest(result: Result): number[] {
  return shownIn(result).map((name) => throughputOf(result)!.of(name).high)
}

/** What loses rows is not shown as fast. */
function shownIn(result: Result): ContenderName[] {
  return result.cell.contenders.filter((name) => COLOURS[name] && !problemsOf(result).has(name))
}

function bars({ results, scenarios }: Panel, index: number, name: ContenderName, place: number, of: number): Series {
  const data = results.flatMap((result) => {
    if (!shownIn(result).includes(name)) return []
    const { median, low, high } = throughputOf(result)!.of(name)
    return [[scenarios.indexOf(result.cell.scenario), median, low, high]]
  })
  return {
    type: 'custom',
    name: (CONTENDERS[name] as Contender).title,
    xAxisIndex: index,
    yAxisIndex: index,
    itemStyle: { color: COLOURS[name]! },
    encode: { x: 0, y: [1, 2, 3] },
    data,
    renderItem: barWithWhisker(place, of),
    z: 2,
  }
}

/** The bar ends at the median, the whisker at the interval's. */
function barWithWhisker(place: number, of: number): CustomSeriesRenderItem {
  return (_, api) => {
    const [band] = api.size!([1, 0]) as number[]
    const width = (band! * 0.8) / of
    const at = (value: number) => api.coord([api.value(0), value])[1]!
    const centre = api.coord([api.value(0), 0])[0]! + (place - (of - 1) / 2) * width
    const [median, low, high] = [1, 2, 3].map((dimension) => at(api.value(dimension) as number)) as [
      number,
      number,
      number,
    ]
    const stroke = { stroke: INK, lineWidth: 1.2 }
    const cap = (y: number) => ({
      type: 'line' as const,
      style: stroke,
      shape: { x1: centre - 3, x2: centre + 3, y1: y, y2: y },
    })
    return {
      type: 'group',
      children: [
        {
          type: 'rect',
          shape: { x: centre - width / 2 + 1, y: median, width: width - 2, height: at(0) - median },
          style: { fill: api.visual('color') as string },
        },
        { type: 'line', style: stroke, shape: { x1: centre, x2: centre, y1: low, y2: high } },
        cap(low),
        cap(high),
      ],
    }
  }
}

function lineAtOne({ scenarios }: Panel, index: number): Series {
  return {
    type: 'bar',
    xAxisIndex: index,
    yAxisIndex: index,
    data: scenarios.map(() => null),
    silent: true,
    markLine: {
      silent: true,
      symbol: 'none',
      label: { show: false },
      lineStyle: { color: INK, type: 'dashed', width: 1.2 },
      data: [{ yAxis: 1 }],
    },
    z: 3,
  }
}
