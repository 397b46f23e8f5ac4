import { type ContenderName, type PlannedCell, SCENARIOS } from './plan.ts'
import type { Result } from './results.ts'
import { type Estimate, estimate, ratios } from './statistics.ts'

/** One number of every turn, compared with the baseline's of the same round. */
export class Comparison {
  /** What the control shows: the same code in another process. Not known if it did not take part. */
  readonly noise: Estimate | undefined
  readonly #estimates: ReadonlyMap<ContenderName, Estimate>

  constructor(cell: PlannedCell, valuesOf: (contender: ContenderName) => readonly number[]) {
    const { baseline, control } = SCENARIOS[cell.scenario]
    const estimates = cell.contenders.map((contender): [ContenderName, Estimate] => [
      contender,
      estimate(ratios(valuesOf(contender), valuesOf(baseline))),
    ])
    this.#estimates = new Map(estimates)
    this.noise = this.#estimates.get(control)
  }

  of(contender: ContenderName): Estimate {
    return this.#estimates.get(contender)!
  }

  /** Whether it is no farther away from 1 than the control's interval reaches. */
  isNoise(contender: ContenderName): boolean {
    const { median } = this.of(contender)
    const { noise } = this
    return noise !== undefined && median >= Math.min(1, noise.low) && median <= Math.max(1, noise.high)
  }
}

/** Requests per second in every round. Of a closed loop: elsewhere they do not say what a contender can do. */
export function perSecondOf({ method, measured }: Result): ((contender: ContenderName) => number[]) | undefined {
  if (method !== 'closed loop') return undefined
  return (name) => measured.turns.get(name)!.map(({ perSecond }) => perSecond)
}

/** The same, compared with the baseline. */
export function throughputOf(result: Result): Comparison | undefined {
  const perSecond = perSecondOf(result)
  return perSecond && new Comparison(result.cell, perSecond)
}

/** `3.05 [2.98, 3.11]` */
export function interval({ median, low, high }: Estimate): string {
  return `${median.toFixed(2)} [${low.toFixed(2)}, ${high.toFixed(2)}]`
}
