import { expect, holdFor, type Load, serversFor } from '../../lib/observe/queueing.ts'
import { type Test, test } from '../support/test.ts'

// The formula's word against a queue that is played through event by event, in its own time: nothing here waits.

/** Random numbers that are the same in every run (mulberry32). */
function dice(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** How long each session waited; those that were refused, `Infinity`. */
function play({ servers, ratePerSecond, holdMillis, timeoutMillis }: Load, sessions: number, seed: number) {
  const random = dice(seed)
  const after = (meanMillis: number) => -Math.log(1 - random()) * meanMillis
  const ends: number[] = []
  const queue: { session: number; since: number }[] = []
  const waits = new Float64Array(sessions)
  let heldMillis = 0
  let now = 0
  const hold = () => {
    const millis = after(holdMillis)
    heldMillis += millis
    ends.push(now + millis)
  }
  const comesBack = (index: number) => {
    now = ends[index]!
    ends.splice(index, 1)
    for (let next = queue.shift(); next !== undefined; next = queue.shift()) {
      waits[next.session] = now - next.since
      if (waits[next.session]! <= timeoutMillis) return hold()
      waits[next.session] = Number.POSITIVE_INFINITY
    }
  }
  let arrival = 0
  for (let session = 0; session < sessions; session++) {
    arrival += after(1000 / ratePerSecond)
    for (let first = earliest(ends); first >= 0 && ends[first]! <= arrival; first = earliest(ends)) comesBack(first)
    now = arrival
    if (ends.length < servers) hold()
    else queue.push({ session, since: now })
  }
  while (queue.length > 0) comesBack(earliest(ends))
  return { waits, utilization: heldMillis / arrival / servers }
}

function earliest(ends: readonly number[]): number {
  let found = -1
  for (let index = 0; index < ends.length; index++) if (found < 0 || ends[index]! < ends[found]!) found = index
  return found
}

/**
 * The mean of `batches` stretches, and how far it may be from the truth. Waits follow upon each other, so their own
 * spread says little; whole stretches are nearly independent, and the mean of 25 is within four of its standard errors
 * of the truth but once in two thousand. The numbers are the same in every run: it passes always, or never.
 */
function judge(values: Float64Array, figureOf: (value: number) => number, batches = 25) {
  const length = Math.floor(values.length / batches)
  const means = Array.from({ length: batches }, (_, batch) => {
    let sum = 0
    for (let index = 0; index < length; index++) sum += figureOf(values[batch * length + index]!)
    return sum / length
  })
  const mean = means.reduce((sum, one) => sum + one, 0) / batches
  const variance = means.reduce((sum, one) => sum + (one - mean) ** 2, 0) / (batches - 1)
  // What happens less than once in the whole play need not be seen.
  return { mean, tolerance: 4 * Math.sqrt(variance / batches) + 1 / values.length }
}

const SESSIONS = 1_500_000

function hold(t: Test, load: Load): void {
  const predicted = expect(load)
  const { waits, utilization } = play(load, SESSIONS, 20)
  const { timeoutMillis } = load
  const figures: [string, number, (wait: number) => number][] = [
    ['share that waits', predicted.waitProbability, (wait) => (wait > 0 ? 1 : 0)],
    ['mean wait', predicted.meanWaitMillis, (wait) => Math.min(wait, timeoutMillis)],
    ['share refused', predicted.timeoutShare, (wait) => (wait > timeoutMillis ? 1 : 0)],
  ]
  if (predicted.p95WaitMillis > 0 && predicted.p95WaitMillis < timeoutMillis) {
    figures.push(['share beyond the p95', 0.05, (wait) => (wait > predicted.p95WaitMillis ? 1 : 0)])
  }
  for (const [what, value, figureOf] of figures) {
    const { mean, tolerance } = judge(waits, figureOf)
    t.ok(Math.abs(mean - value) <= tolerance, `${what}: ${value} predicted, ${mean} seen, ± ${tolerance}`)
    // A tolerance as wide as the figure itself would let anything pass.
    if (value > 1e-3) t.ok(tolerance < value / 4, `${what}: the tolerance is narrow (${tolerance})`)
  }
  t.ok(
    Math.abs(utilization - predicted.utilization) < 0.01,
    `utilization: ${predicted.utilization}, ${utilization} seen`,
  )
}

const LOADS: [string, Load][] = [
  ['hardly anybody waits', { servers: 10, ratePerSecond: 400, holdMillis: 12, timeoutMillis: 10_000 }],
  ['half of them wait', { servers: 8, ratePerSecond: 540, holdMillis: 12, timeoutMillis: 10_000 }],
  ['one connection', { servers: 1, ratePerSecond: 30, holdMillis: 20, timeoutMillis: 10_000 }],
  ['close to the limit some are refused', { servers: 12, ratePerSecond: 970, holdMillis: 12, timeoutMillis: 30 }],
  ['exactly as many come as can be served', { servers: 10, ratePerSecond: 1000, holdMillis: 10, timeoutMillis: 50 }],
  ['overloaded by a half', { servers: 12, ratePerSecond: 1500, holdMillis: 12, timeoutMillis: 200 }],
  ['overloaded, and nobody waits', { servers: 5, ratePerSecond: 700, holdMillis: 10, timeoutMillis: 0 }],
]

for (const [name, load] of LOADS) {
  test(`a simulated queue does what was predicted: ${name}`, async (t) => hold(t, load))
}

test('what cannot be served is refused, and what waits there waits to the end', async (t) => {
  const { offered, utilization, waitProbability, timeoutShare, p95WaitMillis, meanWaitMillis } = expect({
    servers: 12,
    ratePerSecond: 200,
    holdMillis: 2000,
    timeoutMillis: 10_000,
  })
  t.equal(offered, 400)
  t.ok(Math.abs(timeoutShare - (1 - 12 / 400)) < 1e-9, 'served are 12 of 400')
  t.ok(utilization > 0.999_999 && waitProbability > 0.999_999)
  t.equal(p95WaitMillis, 10_000)
  t.ok(meanWaitMillis > 9_900 && meanWaitMillis <= 10_000)
})

test('with a long timeout it is Erlang C, and with none at all Erlang B, as the tables have them', async (t) => {
  // 10 erlang on 12 lines: B = 11.97 %, C = 44.94 %.
  const load = { servers: 12, ratePerSecond: 1000, holdMillis: 10 }
  const patient = expect({ ...load, timeoutMillis: 1e9 })
  t.equal(patient.waitProbability.toFixed(4), '0.4494')
  t.equal(patient.timeoutShare, 0)
  t.equal(patient.meanWaitMillis.toFixed(3), (patient.waitProbability * 5).toFixed(3), 'C / (c mu - lambda)')
  t.equal(patient.p95WaitMillis.toFixed(3), (Math.log(patient.waitProbability / 0.05) * 5).toFixed(3))
  t.equal(expect({ ...load, timeoutMillis: 0 }).timeoutShare.toFixed(4), '0.1197')
})

test('nothing overflows: one connection or a million, a load of nothing or of far too much', async (t) => {
  for (const servers of [1, 500, 1_000_000]) {
    for (const ratePerSecond of [0.001, servers, 1e6]) {
      for (const timeoutMillis of [0, 10_000, 2 ** 31 - 1]) {
        const figures = expect({ servers, ratePerSecond, holdMillis: 1000, timeoutMillis })
        const { utilization, waitProbability, timeoutShare, meanWaitMillis, p95WaitMillis } = figures
        const shares = [utilization, waitProbability, timeoutShare]
        const areShares = shares.every((share) => share >= 0 && share < 1 + 1e-9)
        const areWaits = [meanWaitMillis, p95WaitMillis].every(
          (millis) => millis >= 0 && millis <= timeoutMillis * 1.001,
        )
        t.ok(areShares && areWaits, JSON.stringify({ servers, ratePerSecond, timeoutMillis, ...figures }))
      }
    }
  }
})

test('the smallest number of connections is found with which waiting is rare', async (t) => {
  for (const [rate, holdMillis] of [
    [500, 12],
    [20, 4],
    [1000, 100],
    [3, 2000],
  ] as const) {
    const servers = serversFor(rate, holdMillis)
    const waits = (count: number) =>
      expect({ servers: count, ratePerSecond: rate, holdMillis, timeoutMillis: 1e8 }).waitProbability
    t.ok(servers > (rate * holdMillis) / 1000, `${servers} are more than are held on average`)
    t.ok(waits(servers) <= 0.05 && (servers === 1 || waits(servers - 1) > 0.05), `${servers}, and not one less`)
  }
  t.equal(serversFor(0, 12), 1, 'a pool has one connection at least')
  const many = [serversFor(999_000, 100), serversFor(1_001_000, 100)] as const
  t.ok(many[1] - many[0] > 195 && many[1] - many[0] < 215, `both ways to find it meet: ${many}`)
})

test('the longest hold is the inverse of it', async (t) => {
  for (const servers of [1, 7, 40]) {
    const millis = holdFor(servers, 500)
    t.equal(serversFor(500, millis * 0.999_999), servers)
    t.equal(serversFor(500, millis * 1.000_001), servers + 1)
  }
})
