import type { PlannedCell } from './plan.ts'

/** Says what goes on and how long it will take: on a terminal in one line that changes, otherwise line by line. */
export class Progress {
  readonly #out: NodeJS.WriteStream
  readonly #cells: readonly PlannedCell[]
  #startedAt: number | undefined
  #plannedUntilNow = 0

  constructor(cells: readonly PlannedCell[], out: NodeJS.WriteStream = process.stdout) {
    this.#cells = cells
    this.#out = out
  }

  /** A line that stays. */
  say(line: string): void {
    this.#out.write(`${this.#out.isTTY ? '\r\x1b[K' : ''}${line}\n`)
  }

  /** Round 0 is the warm-up. */
  round(cell: PlannedCell, round: number): void {
    this.#startedAt ??= performance.now()
    const name = round === 0 ? 'warm-up' : `round ${round} of ${cell.rounds}`
    const line = `${cell.scenario} on ${cell.network}: ${name}, about ${minutes(this.#leftMillis())} left`
    if (this.#out.isTTY) this.#out.write(`\r\x1b[K${line}`)
    else if (round > 0) this.say(line)
    this.#plannedUntilNow += plannedMillis(cell) / (cell.rounds + 1)
  }

  clear(): void {
    if (this.#out.isTTY) this.#out.write('\r\x1b[K')
  }

  /** What is planned and not done, at the speed so far. */
  #leftMillis(): number {
    const planned = this.#cells.reduce((sum, cell) => sum + plannedMillis(cell), 0)
    const spent = performance.now() - (this.#startedAt ?? 0)
    const pace = this.#plannedUntilNow === 0 ? 1 : spent / this.#plannedUntilNow
    return (planned - this.#plannedUntilNow) * pace
  }
}

/** Roughly: who takes part, a little more than what is counted, and the warm-up. */
export function plannedMillis({ scenario, contenders, rounds, seconds }: PlannedCell): number {
  const perTurn = { slow: 2 * seconds + 1.3, overload: 5 * seconds + 2.5 }[scenario as string] ?? seconds + 0.36
  return (contenders.length + 1) * (rounds + 0.5) * perTurn * 1000
}

export function minutes(millis: number): string {
  const seconds = Math.max(0, Math.round(millis / 1000))
  return seconds < 90 ? `${seconds} s` : `${Math.round(seconds / 60)} min`
}
