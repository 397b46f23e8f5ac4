import pg from 'pg'

/** What pg's connection serializes for us, beyond what @types/pg knows. */
export interface Wire {
  parse(message: { text: string }): void
  bind(message: { portal: string; values: unknown[]; binary: boolean }): void
  describe(message: { type: 'P'; name: string }): void
  execute(message: { portal: string; rows: number }): void
  close(message: { type: 'P'; name: string }): void
  flush(): void
  sync(): void
}

/** I idle, T in a transaction, E in a failed one: the server's own word, sent with every ReadyForQuery. */
export type TransactionStatus = 'I' | 'T' | 'E'

/** pg's result, with the two methods that build it up. */
export interface Result {
  command: string | null
  rowCount: number | null
  rows: unknown[]
  addFields(fields: unknown[]): void
  addCommandComplete(message: unknown): void
  parseRow(fields: unknown[]): unknown
}
const Result = pg.Result as unknown as new (rowMode: undefined, types: unknown) => Result
const Query = pg.Query as unknown as new (config: { text: string }) => object
const { prepareValue } = (pg as unknown as { utils: { prepareValue: (value: unknown) => unknown } }).utils

/** Maps parameters to what goes over the wire. May throw, therefore it is done before a byte leaves. */
export function mapValues(values: readonly unknown[]): unknown[] {
  return values.map(prepareValue)
}

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
  /** Closes the portal instead of reading on. */
  readonly closes?: boolean
  /** Of ours, before the app's statements: BEGIN, settings. */
  readonly prefix?: boolean
}

/** One statement of a flight and, later, its answer. */
export class Step {
  readonly spec: StepSpec
  /** The server has answered it. Not yet: that its flight is through. */
  completed = false
  /** A portal with rows left. */
  suspended = false
  result: Result | undefined
  /** A row that could not be parsed. The server knows nothing of it. */
  rowError: unknown
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
    this.#onSettle(error, this)
  }

  write(wire: Wire, binary: boolean): void {
    const { text, values = [], describe = false, portal = '', rows = 0, flush = false, closes = false } = this.spec
    if (closes) {
      wire.close({ type: 'P', name: portal })
      return
    }
    if (text !== undefined) {
      wire.parse({ text })
      wire.bind({ portal, values, binary })
      if (describe) wire.describe({ type: 'P', name: portal })
    }
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
 * rest. A flight without statements is a bare Sync. It is a pg.Query only so that pg's client lets it into its pipeline;
 * every method here is one that client calls.
 */
export class Flight extends Query {
  readonly steps: readonly Step[]
  /** Index of the step the server is at. */
  at = 0
  /** What the server refused the step `at` with. */
  error: Error | undefined
  readonly #listener: FlightListener
  readonly #to: FlightTarget
  #over = false
  onReady: (() => void) | undefined

  constructor(steps: readonly Step[], listener: FlightListener, to: FlightTarget) {
    super({ text: '' })
    this.steps = steps
    this.#listener = listener
    this.#to = to
  }

  submit(): void {
    const { wire, binary } = this.#to
    for (const step of this.steps) step.write(wire, binary)
    wire.sync()
  }

  handleRowDescription(message: { fields: unknown[] }): void {
    this.#result()?.addFields(message.fields)
  }

  handleDataRow(message: { fields: unknown[] }): void {
    const step = this.steps[this.at]
    if (step?.result === undefined || step.rowError !== undefined) return
    try {
      step.result.rows.push(step.result.parseRow(message.fields))
    } catch (error) {
      step.rowError = error ?? new Error('A type parser threw nothing')
    }
  }

  handleCommandComplete(message: unknown): void {
    this.#result()?.addCommandComplete(message)
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
    this.#listener.flightLanded(this, status)
  }

  /** The connection is dead. */
  lose(death: Error, reached: boolean): void {
    this.#over = true
    this.#listener.flightLost(this, death, reached)
  }

  #result(): Result | undefined {
    const step = this.steps[this.at]
    if (step === undefined) return undefined
    step.result ??= new Result(undefined, this.#to.types)
    return step.result
  }

  #next(): void {
    const step = this.steps[this.at++]
    if (step === undefined) return
    step.completed = true
    step.onComplete?.()
  }
}

/** What a flight must know of the connection it leaves on. */
export interface FlightTarget {
  readonly wire: Wire
  readonly types: unknown
  readonly binary: boolean
  readonly onFatal: (error: Error) => void
}

// After these the server hangs up, whatever language it says FATAL in: shutdown, crash, timeouts of the whole session.
const FATAL_CODE = /^(57P0|25P0[34])/

/** No ReadyForQuery will follow: pg's own errors come from the socket, and of the server's some end the connection. */
export function isFatal(error: Error): boolean {
  if (!(error instanceof pg.DatabaseError)) return true
  return error.severity === 'FATAL' || error.severity === 'PANIC' || FATAL_CODE.test(error.code ?? '')
}
