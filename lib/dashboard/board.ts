import { listen } from '../observe/channels.ts'
import type { ObservedPool } from '../observe/snapshot.ts'
import { groupHolders, groupWaiters } from './groups.ts'
import { CELL_MILLIS, Lanes } from './lanes.ts'
import { Routes } from './routes.ts'

/** Looks at a pool from its making until `stop()`. */
export class Board {
  readonly #pool: ObservedPool
  readonly #lanes: Lanes
  readonly #routes: Routes
  readonly #timers: NodeJS.Timeout[]
  readonly #unlisten: () => void
  /** Sessions in the queue at the end of each cell, since the last update. */
  #waiting: number[] = []

  constructor(pool: ObservedPool, intervalMillis: number, onUpdate: (update: object) => void) {
    this.#pool = pool
    const at = performance.now()
    this.#lanes = new Lanes(at)
    this.#routes = new Routes(at)
    this.#unlisten = listen(pool, {
      checkout: (event) => this.#lanes.checkedOut(event, performance.now()),
      checkin: (event) => {
        this.#lanes.checkedIn(event, performance.now())
        this.#routes.add(event)
      },
      close: ({ pid }) => this.#lanes.closed(pid),
      invalidate: ({ pid }) => this.#lanes.closed(pid),
    })
    this.#timers = [
      setInterval(() => this.#sample(), CELL_MILLIS).unref(),
      setInterval(() => onUpdate(this.#update()), intervalMillis).unref(),
    ]
  }

  stop(): void {
    this.#unlisten()
    for (const timer of this.#timers) clearInterval(timer)
  }

  #sample(): void {
    const snapshot = this.#pool.snapshot()
    const passed = this.#lanes.sample(snapshot, performance.now())
    for (let cell = 0; cell < passed; cell++) this.#waiting.push(snapshot.waiters.length)
  }

  #update(): object {
    const at = performance.now()
    const { holders, waiters, ...figures } = this.#pool.snapshot()
    const waiting = this.#waiting
    this.#waiting = []
    return {
      time: Date.now(),
      at: Math.round(at),
      cellMillis: CELL_MILLIS,
      pool: figures,
      ...this.#lanes.take(at),
      // Connections that nobody has used since the page was opened.
      unseen: Math.max(0, figures.open - this.#lanes.size),
      queue: waiting,
      holders: groupHolders(holders),
      waiters: groupWaiters(waiters),
      waitersCount: waiters.length,
      routes: this.#routes.read(at),
    }
  }
}
