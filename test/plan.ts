import { type Plan, plan } from '../lib/plan.ts'
import { test } from './support/test.ts'

const USUAL: Plan = {
  processes: 2,
  size: 16,
  maxOverflow: 4,
  ratePerSecond: 500,
  holdMillis: 12,
  timeoutMillis: 10_000,
  maxConnections: 100,
  reserved: 3,
  others: 0,
}

/** The figure in the row of that name. */
function figure(lines: readonly string[], name: string): string | undefined {
  const row = lines.find((line) => line.startsWith(`  ${name} `))
  return row
    ?.slice(name.length + 2)
    .trim()
    .split(/ {3,}/)[0]
}

/** The advice, in one piece. */
function advice(lines: readonly string[]): string {
  const [from, to] = [lines.indexOf('What to change'), lines.indexOf('What this rests on')]
  return lines
    .slice(from + 1, to)
    .join(' ')
    .replace(/\s+/g, ' ')
    .trim()
}

test('what is fine is called fine, with the figures it rests on', async (t) => {
  const lines = plan(USUAL)
  t.equal(figure(lines, 'needed at most'), '40')
  t.equal(figure(lines, 'it has for them'), '97')
  t.equal(figure(lines, 'spare'), '57')
  t.equal(figure(lines, 'in use on average'), '3.0')
  t.equal(figure(lines, 'utilization'), '15 %')
  t.equal(figure(lines, 'have to wait'), '< 0.1 %')
  t.equal(figure(lines, 'p95 wait'), '0 ms')
  t.equal(figure(lines, 'refused'), '0 %')
  t.match(advice(lines), /^Nothing: it is fine as it is\. .* Size 7 with overflow 4 would do as well/)
  t.notMatch(advice(plan({ ...USUAL, size: 6 })), 'would do as well', 'what is not far too large is left alone')
})

test('what does not fit but need not be so large is lowered to what fits', async (t) => {
  const lines = plan({ ...USUAL, processes: 8 })
  t.equal(figure(lines, 'missing'), '63')
  t.match(advice(lines), 'The server cannot give 160 connections')
  t.match(advice(lines), 'Lower each pool to --size 8 --overflow 4: then 8 x 12 = 96 fit into the 97')
  t.notMatch(advice(lines), 'PgBouncer')
})

test('what is followed leads to a plan that is fine', async (t) => {
  const inputs: Plan[] = [
    { ...USUAL, processes: 8 },
    { ...USUAL, size: 1, maxOverflow: 0 },
    { ...USUAL, size: 3, maxOverflow: 3, ratePerSecond: 900 },
    { ...USUAL, processes: 20, ratePerSecond: 50, others: 30 },
  ]
  for (const input of inputs) {
    const [, size, maxOverflow] = /--size (\d+) --overflow (\d+)/.exec(advice(plan(input))) ?? []
    const followed = plan({ ...input, size: Number(size), maxOverflow: Number(maxOverflow) })
    t.match(advice(followed), /^Nothing: it is fine/, `${size} + ${maxOverflow}`)
  }
})

test('a pool that is tight, refuses some or never catches up is called so, and raised where there is room', async (t) => {
  const tight = plan({ ...USUAL, processes: 1, size: 8, maxOverflow: 0 })
  t.match(
    advice(tight),
    /^The pools are tight: 36 % of the requests have to wait\. Raise each pool to --size 11 --overflow 0/,
  )
  t.match(advice(tight), 'Or hold each connection for a shorter time: 7.7 ms would do in place of 12 ms')
  const some = { ...USUAL, processes: 1, size: 12, maxOverflow: 0, ratePerSecond: 950, timeoutMillis: 50 }
  t.match(advice(plan(some)), /^The pools are too small: 0\.4 % of the requests are refused\./)
  const never = plan({ ...some, ratePerSecond: 1950, timeoutMillis: 10_000 })
  t.match(advice(never), 'more is asked of them than they can ever do')
  t.equal(figure(never, 'refused'), '49 %')
  t.equal(figure(never, 'p95 wait'), '10 s')
})

test('where the server is too small for the load, all ways out are named, with their figures', async (t) => {
  const text = advice(plan({ ...USUAL, processes: 8, ratePerSecond: 3200, holdMillis: 20 }))
  t.match(text, 'this load needs 14 a worker, 112 in all, and there is room for 97')
  t.match(text, 'with --size 8 --overflow 4, 16 ms would do in place of 20 ms')
  t.match(text, 'Or take --size 8 --overflow 4, the most that fits, if 14 % of the requests may wait')
  t.match(text, 'Put PgBouncer in between, in transaction mode: with one queue for all workers 79 connections do')
  t.match(text, 'Raise max_connections to 115 and each pool to 14 in all')
})

test('PgBouncer is not named where it cannot help, and what fits not where nothing does', async (t) => {
  const much = advice(plan({ ...USUAL, processes: 8, ratePerSecond: 5000, holdMillis: 25 }))
  t.notMatch(much, 'PgBouncer')
  t.match(much, 'but then 23 % of the requests are refused')
  const many = advice(plan({ ...USUAL, processes: 200, size: 1, maxOverflow: 0 }))
  t.match(many, 'Run fewer workers: not even one connection for each fits')
  t.notMatch(many, '--size')
})

test('what is shown as enough time is enough: the figure is rounded down', async (t) => {
  for (const ratePerSecond of [37, 500, 4321]) {
    const input = { ...USUAL, size: 5, maxOverflow: 0, ratePerSecond, holdMillis: 2000 }
    const [, millis] = /time: (?:with .*, )?([\d.]+) ms would do/.exec(advice(plan(input))) ?? []
    const size = Number(/with --size (\d+)/.exec(advice(plan(input)))?.[1] ?? 5)
    t.match(advice(plan({ ...input, size, holdMillis: Number(millis) })), /^Nothing: it is fine/, `${millis} ms`)
  }
})

test('it stays within the width of a terminal, whatever the figures', async (t) => {
  const inputs: Plan[] = [
    USUAL,
    { ...USUAL, processes: 8, ratePerSecond: 3200, holdMillis: 20 },
    { ...USUAL, processes: 1, size: 1, maxOverflow: 0, ratePerSecond: 0.01, holdMillis: 0.5, timeoutMillis: 0 },
    { ...USUAL, processes: 1000, size: 1000, ratePerSecond: 100_000, holdMillis: 60_000, others: 5000 },
  ]
  for (const lines of inputs.map(plan)) {
    t.strictSame(
      lines.filter((line) => line.length > 100 || /\s$|NaN|Infinity|undefined/.test(line)),
      [],
    )
  }
})
