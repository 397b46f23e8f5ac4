import { setTimeout as pause } from 'node:timers/promises'
import type { Who } from '../observe/snapshot.ts'
import type { Pool } from '../pool/pool.ts'

const LOOK_AGAIN_MILLIS = 5

/** What sessions have left behind, by route. */
export class Notebook {
  readonly #pool: Pool
  #findings: string[] = []

  constructor(pool: Pool) {
    this.#pool = pool
  }

  readonly ends = (who: Who, unanswered: string | undefined, isOpen: boolean): void => {
    if (unanswered !== undefined) this.#findings.push(`${nameOf(who)} did not await a statement: ${unanswered}`)
    if (isOpen) this.#findings.push(`${nameOf(who)} left a nested transaction, or the raw client, open`)
  }

  /** @throws Error with all that was left behind since the last call. */
  async assertClean(withinMillis: number): Promise<void> {
    const until = performance.now() + withinMillis
    while (this.#isBusy() && performance.now() < until) await pause(LOOK_AGAIN_MILLIS)
    const { holders, waiters } = this.#pool.snapshot()
    const findings = this.#findings.splice(0)
    for (const holder of holders) {
      const what = holder.inTransaction ? 'a connection with an open transaction' : 'a connection'
      findings.push(`${nameOf(holder)} holds ${what}, last: ${holder.lastStatement ?? 'nothing sent'}`)
    }
    for (const waiter of waiters) findings.push(`${nameOf(waiter)} waits for a connection`)
    if (findings.length > 0) throw new Error(`Sessions have left something behind:\n  ${findings.join('\n  ')}`)
  }

  #isBusy(): boolean {
    const { checkedOut, waiting } = this.#pool.snapshot()
    return checkedOut + waiting > 0
  }
}

function nameOf({ method, route }: { method: string; route: string }): string {
  return method === '' ? `the session "${route}"` : `${method} ${route}`
}
