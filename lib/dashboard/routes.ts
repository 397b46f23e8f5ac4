import type { CheckinEvent } from '../observe/channels.ts'
import { Histogram } from './histogram.ts'
import { labelOf } from './labels.ts'

const MOST_ROUTES = 100
const TURN_MILLIS = 10_000

/** What a route did with its connections within the last minute. */
export interface RouteTimes {
  readonly name: string
  readonly count: number
  readonly holdP50: number
  readonly holdP95: number
  readonly busyP95: number
}

/** Hold and busy times by route. */
export class Routes {
  readonly #routes = new Map<string, { hold: Histogram; busy: Histogram }>()
  #turnedAt: number

  constructor(at: number) {
    this.#turnedAt = at
  }

  add({ who, heldMillis, busyMillis }: Pick<CheckinEvent, 'who' | 'heldMillis' | 'busyMillis'>): void {
    let name = labelOf(who)
    if (!this.#routes.has(name) && this.#routes.size >= MOST_ROUTES) name = 'all others'
    const route = this.#routes.get(name) ?? { hold: new Histogram(), busy: new Histogram() }
    this.#routes.set(name, route)
    route.hold.add(heldMillis)
    route.busy.add(busyMillis)
  }

  /** The one that takes most of the pool first. */
  read(at: number): RouteTimes[] {
    for (; at - this.#turnedAt >= TURN_MILLIS; this.#turnedAt += TURN_MILLIS) this.#turn()
    return Array.from(this.#routes, ([name, { hold, busy }]) => ({
      name,
      count: hold.count,
      holdP50: round(hold.quantile(0.5)),
      holdP95: round(hold.quantile(0.95)),
      busyP95: round(busy.quantile(0.95)),
    })).sort((one, other) => other.count * other.holdP50 - one.count * one.holdP50)
  }

  #turn(): void {
    for (const [name, { hold, busy }] of this.#routes) {
      hold.turn()
      busy.turn()
      if (hold.count === 0) this.#routes.delete(name)
    }
  }
}

const round = (millis: number): number => Math.round(millis * 10) / 10
