import pg from 'pg'
import { sqlStateOf } from '../errors.ts'
import type { ObservedStatement } from '../observe/statement.ts'
import type { Prepared, PreparedStatements } from './statements.ts'

/** What pg's connection serializes for us, beyond what @types/pg knows. */
export interface Wire {
  parse(message: { name: string; text: string }): void
  bind(message: { portal: string; statement: string; values: unknown[]; binary: boolean }): void
  describe(message: { type: 'P'; name: string }): void
  execute(message: { portal: string; rows: number }): void
  close(message: { type: 'P' | 'S'; name: string }): void
  flush(): void
  sync(): void
  /** What `write` writes, which is the same for the same `key` for ever. */
  fixed(key: string, write: () => void): void
}

/** I idle, T in a transaction, E in a failed one: the server's own word, sent with every ReadyForQuery. */
export type TransactionStatus = 'I' | 'T' | 'E'

/** pg's result, with the methods that build it up. */
export interface Result {
  command: string | null
  rowCount: number | null
  rows: unknown[]
  addFields(fields: unknown[]): void
  addCommandComplete(message: unknown): void
  parseRow(fields: unknown[]): unknown
}
const Result = pg.Result as unknown as new (rowMode: undefined, types: unknown) => Result
const { prepareValue } = (pg as unknown as { utils: { prepareValue: (value: unknown) => unknown } }).utils

/** An empty result with the columns of `shape`. */
function resultLike(shape: Result): Result {
  const result = Object.create(shape) as Result
  result.rows = []
  return result
}

/** Maps parameters to what goes over the wire. May throw, therefore it is done before a byte leaves. */
export function mapValues(values: readonly unknown[]): unknown[] {
  return values.map(prepareValue)
}

/** Cleans a connection of all that sessions leave behind. In front of a flight: where it fails, none of the rest is run. */
export const DISCARD = { text: 'DISCARD ALL', fixed: true, prefix: true, resets: true }

interface StepSpec {
  /** SQL; absent where an open portal is read on. */
  readonly text?: string
  /** Already mapped. */
  readonly values?: unknown[]
  /** Rows are wanted: ask for their description. Commands such as BEGIN do without. */
  readonly describe?: boolean
  /** Name of the portal (the protocol's cursor) to open or read on. */
  readonly portal?: string
  /** How many rows to fetch from it; 0 all. */
  readonly rows?: number
  /** Have the server send its answers up to here without waiting for the end of the flight. */
  readonly flush?: boolean
  /** Ends all names too: can only be the first of a flight. */
  readonly resets?: boolean
  /** Closes the portal instead of reading on. */
  readonly closes?: boolean
  /** Of ours, before the app's statements: BEGIN, settings. */
  readonly prefix?: boolean
  /** A command that is sent over and over: one of few texts, without values. */
  readonly fixed?: boolean
}

const NO_VALUES: unknown[] = []

/** One statement of a flight and, later, its answer. */
export class Step {
  readonly spec: StepSpec
  /** The server has answered it. Not yet: that its flight is through. */
  completed = false
  /** A portal with rows left. */
  suspended = false
  /** What the server says it has done, such as `COMMIT`, where no result was asked for. */
  tag: string | undefined
  result: Result | undefined
  /** A row that could not be parsed. The server knows nothing of it. */
  rowError: unknown
  /** The named statement it runs. */
  prepared: Prepared | undefined
  /** Somebody listens to what becomes of it. */
  event: ObservedStatement | undefined
  /** Called when the server has answered this step, before its flight is through. */
  onComplete: (() => void) | undefined
  readonly #onSettle: (error: unknown, step: Step) => void
  #isSettled = false

  /** `onSettle` is called once: when its flight is through, or has failed, or waits too long. */
  constructor(spec: StepSpec, onSettle: (error: unknown, step: Step) => void) {
    this.spec = spec
    this.#onSettle = onSettle
  }

  settle(error: unknown): void {
    if (this.#isSettled) return
    this.#isSettled = true
    this.event?.settled(error, this.result)
    this.#onSettle(error, this)
  }

  write(wire: Wire, binary: boolean): void {
    const { text, portal = '', rows = 0, closes = false } = this.spec
    if (closes) wire.close({ type: 'P', name: portal })
    else if (text === undefined) wire.execute({ portal, rows })
    else if (!this.spec.fixed) this.#writeStatement(wire, text, binary)
    else if (this.prepared === undefined) wire.fixed(text, () => this.#writeStatement(wire, text, binary))
    else if (this.prepared.isReady) wire.fixed(this.prepared.name, () => this.#writeStatement(wire, text, binary))
    else this.#writeStatement(wire, text, binary)
  }

  #writeStatement(wire: Wire, text: string, binary: boolean): void {
    const { values = NO_VALUES, portal = '', rows = 0, describe = false, flush = false } = this.spec
    const { prepared } = this
    const name = prepared === undefined ? '' : prepared.name
    if (prepared === undefined || !prepared.isSent) wire.parse({ name, text })
    if (prepared !== undefined) prepared.isSent = true
    wire.bind({ portal, statement: name, values, binary })
    if (describe && prepared?.shape === undefined) wire.describe({ type: 'P', name: portal })
    wire.execute({ portal, rows })
    if (flush) wire.flush()
  }
}

/** What a flight tells its sender, in this order: nothing, or one of the two. */
export interface FlightListener {
  /** The server has gone through all of it; `failedAt` is the index of the step it refused, if it did. */
  flightLanded(flight: Flight, status: TransactionStatus): void
  /** The connection died. `reached` is false where the server surely did nothing of this flight. */
  flightLost(flight: Flight, death: Error, reached: boolean): void
}

/**
 * Statements that leave together under ONE Sync: the server runs them in order, and after the first failure none of the
 * rest. A flight without statements is a bare Sync. Every method here is one that pg's client calls.
 */
export class Flight {
  readonly steps: readonly Step[]
  /** Index of the step the server is at. */
  at = 0
  /** What the server refused the step `at` with. */
  error: Error | undefined
  readonly #listener: FlightListener
  readonly #to: FlightTarget
  #hasNames = false
  #over = false
  onReady: (() => void) | undefined

  constructor(steps: readonly Step[], listener: FlightListener, to: FlightTarget) {
    this.steps = steps
    this.#listener = listener
    this.#to = to
  }

  submit(): void {
    const { wire, binary, statements } = this.#to
    if (this.steps[0]?.spec.resets) statements.dropAll()
    for (const step of this.steps) {
      const { text, portal, resets } = step.spec
      // A portal needs its statement for longer than a flight.
      const isUnnamed = text === undefined || portal !== undefined || resets === true
      step.prepared = isUnnamed ? undefined : statements.use(text, this)
      this.#hasNames ||= step.prepared !== undefined
    }
    for (const name of statements.takeClosing()) wire.close({ type: 'S', name })
    for (const step of this.steps) step.write(wire, binary)
    wire.sync()
  }

  handleRowDescription({ fields }: { fields: unknown[] }): void {
    const step = this.steps[this.at]
    if (step === undefined) return
    const result = step.result ?? new Result(undefined, this.#to.types)
    result.addFields(fields)
    if (step.prepared === undefined) step.result = result
    else {
      step.prepared.shape = result
      step.result = resultLike(result)
    }
  }

  handleDataRow(message: { fields: unknown[] }): void {
    const result = this.#result()
    const step = this.steps[this.at]
    if (step === undefined || result === undefined || step.rowError !== undefined) return
    try {
      result.rows.push(result.parseRow(message.fields))
    } catch (error) {
      step.rowError = error ?? new Error('A type parser threw nothing')
    }
  }

  handleCommandComplete(message: { text: string }): void {
    const step = this.steps[this.at]
    const result = this.#result()
    if (step !== undefined) step.tag = message.text
    result?.addCommandComplete(message)
    // Both also end the names that others have given.
    if (result?.command === 'DISCARD' || result?.command === 'DEALLOCATE') this.#to.statements.forgetAll()
    this.#to.onTag(message.text)
    this.#next()
  }

  handleEmptyQuery(): void {
    this.#result()
    this.#next()
  }

  handlePortalSuspended(): void {
    const step = this.steps[this.at]
    if (step !== undefined) step.suspended = true
    this.#next()
  }

  /** The server now takes rows for commands and ignores our Sync: there is no way back to an orderly connection. */
  handleCopyInResponse(): void {
    this.#to.onFatal(new Error('COPY FROM STDIN needs the raw client: use withClient(fn)'))
  }

  handleCopyData(): void {}

  /** The server's refusal, or pg's word that the connection is gone. */
  handleError(error: Error): void {
    if (this.#over) return
    this.error ??= error
    if (isFatal(error)) this.#to.onFatal(this.error)
  }

  /** For who drives the client alone. Else the connection counts: after an error pg does not pass ReadyForQuery on. */
  handleReadyForQuery(): void {
    this.onReady?.()
  }

  /** ReadyForQuery has come. */
  land(status: TransactionStatus): void {
    this.#over = true
    if (this.#hasNames) this.#settleNames()
    this.#listener.flightLanded(this, status)
  }

  /** The connection is dead. */
  lose(death: Error, reached: boolean): void {
    this.#over = true
    this.#listener.flightLost(this, death, reached)
  }

  // The result of the step that the server is at, where one was asked for.
  #result(): Result | undefined {
    const step = this.steps[this.at]
    if (!step?.spec.describe && step?.result === undefined) return undefined
    const shape = step.prepared?.shape as Result | undefined
    step.result ??= shape === undefined ? new Result(undefined, this.#to.types) : resultLike(shape)
    return step.result
  }

  #next(): void {
    const step = this.steps[this.at++]
    if (step === undefined) return
    step.completed = true
    step.event?.answered()
    step.onComplete?.()
  }

  // A name whose statement failed, in whatever way, is not trusted again; of what was skipped nothing was parsed.
  #settleNames(): void {
    const { statements, types } = this.#to
    for (const [index, { prepared, spec }] of this.steps.entries()) {
      if (prepared === undefined) continue
      if (index < this.at) {
        prepared.isReady = true
        if (spec.describe) prepared.shape ??= new Result(undefined, types)
      } else if (index === this.at || !prepared.isReady) statements.forget(prepared)
    }
    const text = this.steps[this.at]?.spec.text
    if (text === undefined || !isStale(this.error)) return
    statements.dropEverywhere(text)
    Object.assign(this.error as Error, { retryable: true, statusCode: 503 })
  }
}
// pg's client lets only its own kind of query into its pipeline. What its constructor makes would never be used.
Object.setPrototypeOf(Flight.prototype, pg.Query.prototype)

/** What a flight must know of the connection it leaves on. */
export interface FlightTarget {
  readonly wire: Wire
  readonly statements: PreparedStatements
  readonly types: unknown
  readonly binary: boolean
  readonly onFatal: (error: Error) => void
  /** The server has done something, such as `DISCARD ALL`. */
  readonly onTag: (tag: string) => void
}

// After these the server hangs up, whatever language it says FATAL in: shutdown, crash, timeouts of the whole session.
const FATAL_CODE = /^(57P0|25P0[34])/

/** No ReadyForQuery will follow: pg's own errors come from the socket, and of the server's some end the connection. */
export function isFatal(error: Error): boolean {
  if (!(error instanceof pg.DatabaseError)) return true
  return error.severity === 'FATAL' || error.severity === 'PANIC' || FATAL_CODE.test(error.code ?? '')
}

// The statement behind the name was changed (`cached plan must not change result type`), or the name is gone.
function isStale(error: Error | undefined): boolean {
  const { routine } = (error ?? {}) as { routine?: string }
  const state = sqlStateOf(error)
  return state === '26000' || (state === '0A000' && routine === 'RevalidateCachedQuery')
}
