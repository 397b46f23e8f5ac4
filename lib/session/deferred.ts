import { SettleFailed, sqlStateOf } from '../errors.ts'
import { Step } from '../pool/flight.ts'

/** Where writes are kept: a scope. */
interface Keeper {
  kept: Step[]
}

/** Writes that are kept until something else is sent, and the first of them that failed. */
export class DeferredWrites {
  readonly #pool: string
  readonly #consequence: string
  #count = 0
  #failure: { what: string; error: Error } | undefined

  /** `consequence` is what the failure of one means for the rest, in words. */
  constructor(pool: string, consequence: string) {
    this.#pool = pool
    this.#consequence = consequence
  }

  keep(scope: Keeper, text: string, values: unknown[]): Step {
    const what = `Deferred write ${++this.#count}`
    const onSettle = (error: unknown) => {
      if (error !== undefined) this.#failure ??= { what, error: error as Error }
    }
    const step = new Step({ text, values, describe: true }, onSettle)
    scope.kept.push(step)
    return step
  }

  /** What `scope` has kept, to be sent now: an array of the caller's own. */
  take(scope: Keeper): Step[] {
    const { kept } = scope
    if (kept.length === 0) return []
    scope.kept = []
    return kept
  }

  /** What the first failed with, as pg made it. */
  get error(): Error | undefined {
    return this.#failure?.error
  }

  /** What the first failed with, in words of ours where it was PostgreSQL that refused it. */
  get failure(): Error | undefined {
    if (this.#failure === undefined) return undefined
    const { what, error } = this.#failure
    return sqlStateOf(error) === undefined ? error : new SettleFailed(what, this.#pool, error, this.#consequence)
  }

  /** What failed is undone, or was told. */
  forgive(): void {
    this.#failure = undefined
  }

  /** A new transaction counts from one again. */
  reset(): void {
    this.#count = 0
    this.#failure = undefined
  }
}
