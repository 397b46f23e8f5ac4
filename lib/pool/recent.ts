import type { Lately, RouteUse } from '../observe/facts.ts'
import type { Who } from '../observe/snapshot.ts'
import { labelOf } from '../observe/words.ts'

class Sums implements RouteUse {
  readonly method: string
  readonly route: string
  count = 0
  heldMillis = 0
  busyMillis = 0
  statements = 0

  constructor(method: string, route: string) {
    this.method = method
    this.route = route
  }
}

/** By route and method, which are looked up one by one so that no key has to be made. */
class Window {
  readonly routes = new Map<string, Map<string, Sums>>()
  refused = 0
}

// Shorter holds are not worth remembering for longer than a window.
const LONG_MILLIS = 500
const MOST_REMEMBERED = 500

/** What the routes did with their connections of late: one to two windows of time, in sums that cost next to nothing. */
export class Recent {
  readonly #windowMillis: number
  #current = new Window()
  #before = new Window()
  #since: number
  #beforeSince: number
  readonly #longest = new Map<string, number>()

  constructor(windowMillis: number, at: number) {
    this.#windowMillis = windowMillis
    this.#since = at
    this.#beforeSince = at
  }

  /** A session of `who` has given its connection back. */
  add(who: Who, heldMillis: number, busyMillis: number, statements: number, at: number): void {
    this.#turn(at)
    const { routes } = this.#current
    const methods = routes.get(who.route) ?? new Map<string, Sums>()
    const sums = methods.get(who.method) ?? new Sums(who.method, who.route)
    if (sums.count === 0) routes.set(who.route, methods.set(who.method, sums))
    sums.count++
    // What was long before is not of late.
    const share = Math.min(1, (2 * this.#windowMillis) / heldMillis)
    sums.heldMillis += heldMillis * share
    sums.busyMillis += busyMillis * share
    sums.statements += statements
    if (heldMillis >= LONG_MILLIS) this.#remember(who, heldMillis)
  }

  #remember(who: Who, heldMillis: number): void {
    const key = labelOf(who)
    if (this.#longest.size >= MOST_REMEMBERED) this.#longest.clear()
    this.#longest.set(key, Math.max(heldMillis, this.#longest.get(key) ?? 0))
  }

  /** A session was refused. */
  refuse(at: number): void {
    this.#turn(at)
    this.#current.refused++
  }

  /** The sums by route. */
  read(at: number): Lately {
    this.#turn(at)
    const routes = new Map<string, Sums>()
    for (const window of [this.#before, this.#current]) {
      for (const sums of Array.from(window.routes.values()).flatMap((methods) => [...methods.values()])) {
        const key = `${sums.method} ${sums.route}`
        const all = routes.get(key) ?? new Sums(sums.method, sums.route)
        all.count += sums.count
        all.heldMillis += sums.heldMillis
        all.busyMillis += sums.busyMillis
        all.statements += sums.statements
        routes.set(key, all)
      }
    }
    const refused = this.#before.refused + this.#current.refused
    const millis = Math.max(1, at - this.#beforeSince)
    return { routes: [...routes.values()], refused, millis, longestMillis: this.#longest }
  }

  #turn(at: number): void {
    const windows = Math.floor((at - this.#since) / this.#windowMillis)
    if (windows < 1) return
    this.#before = windows === 1 ? this.#current : new Window()
    this.#beforeSince = windows === 1 ? this.#since : at
    this.#current = new Window()
    this.#since = at
  }
}
