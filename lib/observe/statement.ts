import type { FastifyBaseLogger } from 'fastify'
import * as channels from './channels.ts'
import type { ObservedPool, Who } from './snapshot.ts'

interface Result {
  readonly rowCount: number | null
  readonly rows: readonly unknown[]
}

/** Whose statement it is. */
interface Speaker {
  readonly who: Who
  readonly log: FastifyBaseLogger
}

/** A statement that somebody listens to, from the app's call to its outcome. */
export class ObservedStatement {
  readonly #event: channels.StatementEvent
  #leftAt = 0
  #answeredAt = 0

  /** Undefined, and nothing done, where nobody listens. To be called where the app asks for the statement. */
  static of(
    pool: ObservedPool,
    { who, log }: Speaker,
    text: string,
    parameters: readonly unknown[],
  ): ObservedStatement | undefined {
    if (!channels.statement.hasSubscribers && !channels.statementStart.hasSubscribers) return undefined
    const outcome = { pid: undefined, millis: 0, rowCount: undefined, rows: undefined, error: undefined }
    return new ObservedStatement({ pool, log, who, text, parameters, ...outcome })
  }

  private constructor(event: channels.StatementEvent) {
    this.#event = event
    channels.statementStart.publish(event)
  }

  leaves(pid: number): void {
    this.#event.pid = pid
    this.#leftAt = performance.now()
  }

  answered(): void {
    this.#answeredAt = performance.now()
  }

  settled(error: unknown, result: Result | undefined): void {
    const event = this.#event
    if (this.#leftAt > 0) event.millis = (this.#answeredAt || performance.now()) - this.#leftAt
    // A SAVEPOINT has none, a portal that is not at its end has no count yet.
    event.rowCount = result?.rowCount ?? (result?.rows.length || undefined)
    event.rows = result?.rows
    event.error = error as Error | undefined
    channels.statement.publish(event)
  }
}
