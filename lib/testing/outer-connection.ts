import { sqlStateOf } from '../errors.ts'
import { Connection } from '../pool/connection.ts'
import { type Flight, type FlightListener, Step, type TransactionStatus } from '../pool/flight.ts'

const NAME = 'request_db_test'
const SAVE = `SAVEPOINT ${NAME}`
const BACK = `ROLLBACK TO SAVEPOINT ${NAME}`
const RELEASE = `RELEASE SAVEPOINT ${NAME}`
const CHECK = `${NAME}_check`
// Deferred constraints are looked at where a COMMIT would look at them, and are as deferred as before from then on.
const CHECKS = [
  `SAVEPOINT ${CHECK}`,
  'SET CONSTRAINTS ALL IMMEDIATE',
  `ROLLBACK TO SAVEPOINT ${CHECK}`,
  `RELEASE SAVEPOINT ${CHECK}`,
]
const ENDS = /^\s*(commit|end|abort|rollback(?!\s+to)|start\s+transaction|begin|prepare\s+transaction)\b/i
const REFUSED = `do $$ begin
  raise exception 'COMMIT, ROLLBACK and BEGIN are the session''s own: use commit() and rollback()'
    using errcode = '0A000';
end $$`
const IN_FAILED_TRANSACTION = '25P02'

const ignore = () => {}
const plain = (text: string) => new Step({ text }, ignore)
const withValues = (text: string, values: unknown[]) => new Step({ text, values }, ignore)

/**
 * A connection that stays in one transaction. What sessions take for theirs is a savepoint in it: BEGIN sets it, COMMIT
 * releases it, ROLLBACK goes back to it, and between two sessions the connection looks idle.
 */
export class OuterConnection extends Connection {
  // A session behind an unanswered COMMIT would have to know what it came to.
  override readonly canBeFollowed = false
  #isOpen = false
  // Run-time parameters that the running session has set: RELEASE would keep them for the next one.
  #settings: string[] = []

  override get status(): TransactionStatus {
    return this.#isOpen ? super.status : 'I'
  }

  /** Begins or ends the outer transaction itself. */
  sendOuter(text: string, timeoutMillis: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const done = (alive: boolean, refusal?: Error) => {
        if (alive && refusal === undefined) resolve()
        else reject(refusal ?? this.death)
      }
      this.#isOuter = true
      this.sendWithin(timeoutMillis, text, [plain(text)], done)
      this.#isOuter = false
    })
  }
  #isOuter = false

  override send(steps: readonly Step[], listener: FlightListener): Flight | undefined {
    // A ping, or what stands outside of all sessions.
    if (steps.length === 0 || this.#isOuter) return super.send(steps, listener)
    const isBegin = isCommand(steps[0], /^BEGIN/)
    const isAlone = !this.#isOpen && !isBegin
    this.#isOpen = true
    const parts = steps.map((step) => this.#translate(step))
    // Without a transaction of its own, a statement that fails must not take the outer one along.
    if (isAlone) {
      parts[0]?.unshift(plain(SAVE))
      parts[parts.length - 1]?.push(...this.#unset(), plain(RELEASE))
    }
    const final = steps.find((step) => isCommand(step, /^(COMMIT|ROLLBACK)$/))
    return super.send(parts.flat(), new Landing(this, steps, parts, listener, { final, isAlone }))
  }

  #translate(step: Step): Step[] {
    const { text = '' } = step.spec
    if (isCommand(step, /^BEGIN/)) return this.#begin(step, text)
    if (step.spec.prefix && text.startsWith('SELECT set_config')) return this.#set(step)
    if (isCommand(step, /^COMMIT$/)) return [...CHECKS.map(plain), ...this.#unset(), standIn(step, RELEASE)]
    if (isCommand(step, /^ROLLBACK$/)) {
      this.#settings = []
      return [plain(BACK), standIn(step, RELEASE)]
    }
    if (step.spec.describe && ENDS.test(text)) return [plain(REFUSED), step]
    return [step]
  }

  // The isolation level is the outer transaction's. READ ONLY holds until the savepoint is released.
  #begin(step: Step, text: string): Step[] {
    const begun = standIn(step, SAVE)
    return / READ ONLY/.test(text) ? [begun, plain('SET LOCAL transaction_read_only = on')] : [begun]
  }

  // The server remembers, since COMMIT may come in the same flight.
  #set(step: Step): Step[] {
    const { values = [] } = step.spec
    // READ ONLY ends with the savepoint by itself.
    const names = values.filter((name, index) => index % 2 === 0 && name !== 'transaction_read_only') as string[]
    this.#settings = names
    const keep = `SELECT set_config($1, coalesce(current_setting($2, true), ''), true)`
    return [...names.map((name, at) => withValues(keep, [`${NAME}.before_${at}`, name])), step]
  }

  #unset(): Step[] {
    const restore = 'SELECT set_config($1, current_setting($2), true)'
    return this.#settings.splice(0).map((name, at) => withValues(restore, [name, `${NAME}.before_${at}`]))
  }

  /** The session is over: what comes next is another's. */
  ended(): void {
    this.#isOpen = false
  }

  /** Undoes what a session, or a statement without one, has left in the outer transaction. */
  undo(done: () => void): void {
    this.#settings = []
    super.send([plain(BACK), plain(RELEASE)], { flightLanded: done, flightLost: done })
  }
}

// Commands of ours: the app's statements want their rows.
function isCommand(step: Step | undefined, text: RegExp): boolean {
  return step !== undefined && !step.spec.describe && text.test(step.spec.text ?? '')
}

/** Sends another text for a command, which takes its answer for its own. */
function standIn(step: Step, text: string): Step {
  const stand = new Step({ text, flush: step.spec.flush === true, prefix: true }, ignore)
  stand.onComplete = () => {
    step.completed = true
    step.tag = step.spec.text?.split(' ')[0]
    step.onComplete?.()
  }
  return stand
}

/** Tells a session of its flight in its own words. */
class Landing implements FlightListener {
  readonly #connection: OuterConnection
  readonly #steps: readonly Step[]
  readonly #parts: readonly (readonly Step[])[]
  readonly #listener: FlightListener
  readonly #final: Step | undefined
  readonly #isAlone: boolean

  constructor(
    connection: OuterConnection,
    steps: readonly Step[],
    parts: readonly (readonly Step[])[],
    listener: FlightListener,
    { final, isAlone }: { final: Step | undefined; isAlone: boolean },
  ) {
    this.#connection = connection
    this.#steps = steps
    this.#parts = parts
    this.#listener = listener
    this.#final = final
    this.#isAlone = isAlone
  }

  flightLanded(flight: Flight, status: TransactionStatus): void {
    const { error } = flight
    const isDone = error === undefined && (this.#final !== undefined || this.#isAlone)
    const isRefusedCommit = this.#final?.spec.text === 'COMMIT' && sqlStateOf(error) === IN_FAILED_TRANSACTION
    if (isDone) this.#end(flight)
    else if (isRefusedCommit) this.#connection.undo(() => this.#rolledBack(flight))
    else if (this.#isAlone) this.#connection.undo(() => this.#end(flight))
    else this.#listener.flightLanded(this.#view(flight), status)
  }

  flightLost(flight: Flight, death: Error, reached: boolean): void {
    this.#listener.flightLost(this.#view(flight), death, reached)
  }

  #end(flight: Flight): void {
    this.#connection.ended()
    this.#listener.flightLanded(this.#view(flight), 'I')
  }

  // As a server does with the COMMIT of a transaction that has failed: no error, and it was a rollback.
  #rolledBack(flight: Flight): void {
    const final = this.#final as Step
    final.completed = true
    final.tag = 'ROLLBACK'
    this.#connection.ended()
    const view = this.#view(flight)
    Object.defineProperties(view, { error: { value: undefined }, at: { value: this.#steps.length } })
    this.#listener.flightLanded(view, 'I')
  }

  /** The flight with the steps that the session knows. */
  #view(flight: Flight): Flight {
    let left = flight.at
    let at = 0
    for (const part of this.#parts) {
      if (left < part.length) break
      left -= part.length
      at++
    }
    return Object.create(flight, {
      steps: { value: this.#steps },
      at: { value: at, configurable: true },
      error: { value: flight.error, configurable: true },
    })
  }
}
