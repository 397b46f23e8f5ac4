import t from 'tap'
import { estimate, orderOf, quantiles, ratios } from '../../bench/statistics.ts'

const upTo = (n: number) => Array.from({ length: n }, (_, index) => index + 1)

t.test(
  'with fewer than six rounds the interval is all of them, and says with which probability it holds',
  async (t) => {
    t.same(estimate([7]), { median: 7, low: 7, high: 7, level: 0 })
    t.match(estimate([3, 1, 2]), { median: 2, low: 1, high: 3 })
    t.equal(estimate([3, 1, 2]).level.toFixed(4), '0.7500')
    t.match(estimate(upTo(5)), { median: 3, low: 1, high: 5 })
  },
)

t.test('with more it leaves out what may be left out at 95 %', async (t) => {
  t.match(estimate(upTo(6)), { median: 3.5, low: 1, high: 6 })
  t.match(estimate(upTo(8)), { low: 1, high: 8 })
  t.match(estimate(upTo(9)), { median: 5, low: 2, high: 8 })
  t.equal(estimate(upTo(9)).level.toFixed(4), '0.9609')
  t.match(estimate(upTo(20)), { median: 10.5, low: 6, high: 15 })
})

t.test('one wild round does not move it', async (t) => {
  t.match(estimate([1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 100]), { median: 1.4, low: 1.1, high: 1.7 })
})

t.test('there is no median of nothing', async (t) => {
  t.throws(() => estimate([]), /no median of nothing/)
})

t.test('ratios are taken within the round', async (t) => {
  t.same(ratios([10, 300], [5, 100]), [2, 3])
  t.throws(() => ratios([1, 2], [1]), /2 rounds cannot be compared with 1/)
})

t.test('quantiles are those of all rounds together, and of fractions of a millisecond', async (t) => {
  t.same(quantiles([Float64Array.of(0.4, 0.2), Float64Array.of(0.3)], 0.5), [0.3])
  const [p50, p99] = quantiles([Float64Array.from(upTo(1000))], 0.5, 0.99)
  t.equal(p50, 500.5)
  t.equal(p99?.toFixed(2), '990.01')
  t.ok(Number.isNaN(quantiles([], 0.5)[0]))
})

t.test('everybody has every place once in as many rounds as there are participants', async (t) => {
  for (const n of [2, 3, 4, 9, 10]) {
    const rounds = upTo(n).map((round) => orderOf(upTo(n), round))
    for (const order of rounds)
      t.same(
        [...order].sort((a, b) => a - b),
        upTo(n),
      )
    if (n % 2 === 1) continue
    for (const place of upTo(n)) t.equal(new Set(rounds.map((order) => order[place - 1])).size, n)
  }
})

t.test('nobody keeps following the same neighbour', async (t) => {
  for (const n of [4, 5, 9, 10]) {
    const followed = new Map<string, number>()
    for (const round of upTo(n)) {
      orderOf(upTo(n), round).forEach((who, place, order) => {
        const pair = `${order[place - 1]} ${who}`
        if (place > 0) followed.set(pair, (followed.get(pair) ?? 0) + 1)
      })
    }
    t.equal(Math.max(...followed.values()), n % 2 === 0 ? 1 : 2, `of ${n}`)
  }
})
