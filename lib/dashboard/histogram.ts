// Each bucket reaches 10 % farther than the one before, from 0.1 ms to beyond ten minutes.
const GROWTH = 1.1
const FIRST_MILLIS = 0.1
const BUCKETS = 166

const SLICES = 6

/** Durations of the last minute, counted in buckets: any number of them in the same memory, quantiles within 5 %. */
export class Histogram {
  readonly #slices = Array.from({ length: SLICES }, () => new Uint32Array(BUCKETS))
  #slice = 0
  /** Since it was last emptied by time. */
  count = 0

  add(millis: number): void {
    const bucket = Math.ceil(Math.log(Math.max(millis, FIRST_MILLIS) / FIRST_MILLIS) / Math.log(GROWTH))
    const at = Math.min(bucket, BUCKETS - 1)
    const slice = this.#slices[this.#slice]!
    slice[at] = slice[at]! + 1
    this.count++
  }

  /** To be called every ten seconds: the oldest ten are forgotten. */
  turn(): void {
    this.#slice = (this.#slice + 1) % SLICES
    const oldest = this.#slices[this.#slice]!
    for (const count of oldest) this.count -= count
    oldest.fill(0)
  }

  /** `share` of the durations are at most so many milliseconds long; 0 where there are none. */
  quantile(share: number): number {
    let left = this.count * share
    for (let bucket = 0; bucket < BUCKETS; bucket++) {
      for (const slice of this.#slices) left -= slice[bucket]!
      if (left <= 0) return this.count === 0 ? 0 : FIRST_MILLIS * GROWTH ** Math.max(0, bucket - 0.5)
    }
    return 0
  }
}
