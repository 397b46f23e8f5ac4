import { binomialDistribution, median, quantileSorted } from 'simple-statistics'

/** A median, and the values between which the true one lies with the probability `level`. */
export interface Estimate {
  readonly median: number
  readonly low: number
  readonly high: number
  readonly level: number
}

const WANTED_LEVEL = 0.95

/**
 * An interval of order statistics supposes nothing about how the values are distributed: the true median is below all
 * of n values with the probability 1/2ⁿ, and so on. It leaves out as many of the lowest and of the highest values as the
 * wanted level allows; with fewer than six values that is none, and the level is what it is.
 */
export function estimate(values: readonly number[]): Estimate {
  if (values.length === 0) throw new Error('There is no median of nothing')
  const sorted = [...values].sort((a, b) => a - b)
  const below = binomialDistribution(sorted.length, 0.5) ?? []
  let left = 0
  let outside = below[0]!
  while (2 * (outside + below[left + 1]!) <= 1 - WANTED_LEVEL) outside += below[++left]!
  return {
    median: median(sorted),
    low: sorted[left]!,
    high: sorted.at(-1 - left)!,
    level: Math.max(0, 1 - 2 * outside),
  }
}

/** Each value as a multiple of the one that was measured in the same round. */
export function ratios(values: readonly number[], to: readonly number[]): number[] {
  if (values.length !== to.length) throw new Error(`${values.length} rounds cannot be compared with ${to.length}`)
  return values.map((value, round) => value / to[round]!)
}

/** The quantiles of all values of all rounds; NaN when there is no value. */
export function quantiles(times: readonly Float64Array[], ...which: number[]): number[] {
  const all = new Float64Array(times.reduce((sum, { length }) => sum + length, 0))
  let end = 0
  for (const some of times) {
    all.set(some, end)
    end += some.length
  }
  all.sort()
  // It only reads, and an array of numbers is all it needs.
  return which.map((p) => (all.length === 0 ? Number.NaN : quantileSorted(all as unknown as number[], p)))
}

/**
 * Who is measured when, for every round: everybody has every place once in as many rounds as there are participants,
 * and nobody keeps the same neighbour. (Williams' squares: 0, 1, n-1, 2, n-2 …, moved on by one from round to round. Of an odd
 * number of participants every other round is turned round.)
 */
export function orderOf<T>(participants: readonly T[], round: number): T[] {
  const { length } = participants
  const zigzag = participants.map((_, place) => (place % 2 === 1 ? (place + 1) / 2 : (length - place / 2) % length))
  const order = zigzag.map((place) => participants[(place + round) % length]!)
  return length % 2 === 1 && round % 2 === 1 ? order.reverse() : order
}
