import type { FastifyBaseLogger } from 'fastify'
import * as channels from './channels.ts'
import { type CallSite, type Origin, openerOf } from './origin.ts'
import type { ObservedPool, Who } from './snapshot.ts'
import { labelOf } from './words.ts'

/** A connection in somebody's hands, as far as this matters here. */
interface Held {
  readonly party: { readonly log: FastifyBaseLogger; readonly origin: Origin | undefined }
  readonly who: Who
  readonly pid: number
  readonly callSite: CallSite | undefined
  suspectedAt: number
  heldMillis(at: number): number
}

/** Tells of holders that do not come back. HikariCP: `ProxyLeakTask`. */
export class LeakWatch {
  readonly #pool: ObservedPool
  readonly #millis: number | false
  readonly #timers = new Map<Held, NodeJS.Timeout>()

  constructor(pool: ObservedPool, millis: number | false) {
    this.#pool = pool
    this.#millis = millis
  }

  checkedOut(held: Held): void {
    if (this.#millis === false) return
    this.#timers.set(held, setTimeout(() => this.#suspect(held), this.#millis).unref())
  }

  checkedIn(held: Held): void {
    if (this.#millis === false) return
    clearTimeout(this.#timers.get(held))
    this.#timers.delete(held)
    if (held.suspectedAt > 0) this.#tell(held, true)
  }

  #suspect(held: Held): void {
    held.suspectedAt = performance.now()
    this.#tell(held, false)
  }

  #tell(held: Held, isBack: boolean): void {
    const { who, pid, party } = held
    const heldMillis = held.heldMillis(performance.now())
    const callSite = String(held.callSite ?? '')
    const seconds = `${(heldMillis / 1000).toFixed(1)} s`
    const name = labelOf(who)
    const opened = openerOf(who, party.origin)
    const opener = opened === undefined ? '' : ` opened in ${labelOf(opened)}`
    const fields = { event: 'leak', pool: this.#pool.name, ...who, pid, heldMillis, isBack, callSite }
    if (isBack) {
      party.log.warn(
        { requestDb: fields },
        `request-db: connection of ${name}${opener} came back after ${seconds}: it was no leak, but held for longer than leakDetectionMillis`,
      )
    } else {
      party.log.warn(
        { requestDb: fields },
        `request-db: ${name}${opener} has held a connection for ${seconds}, is it leaked? It was checked out\n${callSite}`,
      )
    }
    if (channels.leak.hasSubscribers) {
      channels.leak.publish({ pool: this.#pool, log: party.log, who, pid, heldMillis, isBack, callSite })
    }
  }
}
