import type { Duplex } from 'node:stream'
import pg from 'pg'
import { NestedConflict } from '../errors.ts'
import { type CancelTarget, cancelOnServer } from './cancel.ts'
import {
  DISCARD,
  Flight,
  type FlightListener,
  type FlightTarget,
  Step,
  type TransactionStatus,
  type Wire,
} from './flight.ts'
import { now } from './queue.ts'
import type { PreparedStatements, StatementNames } from './statements.ts'

/** What we need of pg's client beyond what @types/pg knows. */
interface Client extends Omit<pg.Client, 'pipeline' | 'connection' | 'ssl'> {
  pipeline: boolean
  readonly connection: Wire & {
    readonly stream: Duplex
    /** The names that pg believes to be known to the server. */
    parsedStatements: Record<string, string>
    on(event: 'readyForQuery', listener: (message: { status: TransactionStatus }) => void): void
    on(event: 'commandComplete', listener: (message: { text: string }) => void): void
    off(event: 'commandComplete', listener: (message: { text: string }) => void): void
  }
  readonly processID: number
  readonly secretKey: number
  readonly ssl: unknown
  readonly sslNegotiation: string
  readonly binary: boolean
  readonly _types: unknown
  getTransactionStatus(): TransactionStatus | null
}

const ignore = () => {}

/** Who is told what a borrower does with the raw client. */
export interface RawUser {
  asked(text: string): void
  /** The server has answered all of it. */
  answered(): void
}

// A text, a query of pg's, or something that brings one along, such as a cursor.
function textOf(query: unknown): string {
  const { text, cursor } = (query ?? {}) as { text?: unknown; cursor?: { text?: unknown } }
  const [found] = [query, text, cursor?.text].filter((value) => typeof value === 'string')
  return (found as string | undefined) ?? '(raw client)'
}

// How long the server may take to answer a goodbye before the socket is cut.
const GOODBYE_MILLIS = 500

// A timer that fires this late was held up by the app, and so was what it waits for.
const LATE_MILLIS = 20

/** Calls `onTimeout` after `millis`, or twice that if the app kept the event loop from reading meanwhile. */
function watch(millis: number, onTimeout: () => void): () => void {
  let due = now() + millis
  const verdict = (last: boolean) => {
    if (last || now() - due < LATE_MILLIS) {
      immediate = setImmediate(onTimeout)
      return
    }
    due = now() + millis
    timer = setTimeout(verdict, millis, true)
  }
  let immediate: NodeJS.Immediate | undefined
  let timer = setTimeout(verdict, millis, false)
  return () => {
    clearTimeout(timer)
    clearImmediate(immediate)
  }
}

/**
 * Collects what is written during a turn of the event loop and sends it in one piece: a system call costs more than all
 * the rest of a small statement, and a COMMIT and the next session's first flight often leave in the same turn.
 */
class Packet {
  readonly writable = true
  readonly #stream: Duplex
  #chunks: Buffer[] = []
  readonly #fixed = new Map<string, Buffer>()

  constructor(stream: Duplex) {
    this.#stream = stream
  }

  write(chunk: Buffer): boolean {
    if (this.#chunks.length === 0) process.nextTick(this.#leave)
    this.#chunks.push(chunk)
    return true
  }

  fixed(key: string, write: () => void): void {
    const known = this.#fixed.get(key)
    if (known !== undefined) {
      this.write(known)
      return
    }
    const from = this.#chunks.length
    write()
    this.#fixed.set(key, Buffer.concat(this.#chunks.slice(from)))
  }

  readonly #leave = (): void => {
    const chunks = this.#chunks
    this.#chunks = []
    if (this.#stream.writable) this.#stream.write(Buffer.concat(chunks))
  }
}

/** pg's own serializer, writing into a packet instead of the socket. */
function packing(connection: Client['connection']): Wire {
  const packet = new Packet(connection.stream)
  const fixed = (key: string, write: () => void) => packet.fixed(key, write)
  return Object.create(connection, { stream: { value: packet }, fixed: { value: fixed } }) as Wire
}

/**
 * One connection to PostgreSQL, for as long as it lives: a pg.Client in pipeline mode, its flights in the order they
 * left, and one permanent `error` listener, because pg emits two errors for every killed backend.
 */
export class Connection {
  readonly pid: number
  /** From this moment on (monotonic) it is replaced when it is next free. */
  expiresAt: number
  idleSince = 0
  /** A session may have left something behind on it that DISCARD ALL would remove, and that has not been confirmed. */
  isDirty = false
  /** Another session may send behind its last one's COMMIT or ROLLBACK, before that is answered. */
  readonly canBeFollowed: boolean = true
  /** How often it was lent. */
  uses = 0
  /** A flight leaves when the one before it is answered, and not behind it. To be set only while it is quiet. */
  isSerial = false
  /** DISCARD ALL is under way, outside of any session. */
  isResetting = false
  /** Called when that has been answered, where somebody waits for it. */
  onReset: (() => void) | undefined
  /** Why it is unusable. */
  death: Error | undefined
  /** It died by our hand, for want of an answer. */
  killed = false
  /** Called once when it dies without having been asked to. */
  onDeath: ((death: Error) => void) | undefined
  readonly #client: Client
  readonly #config: pg.ClientConfig
  readonly #statements: PreparedStatements
  // Each flight has exactly one Sync, so the ReadyForQuerys come in the order of this list.
  #sent: Flight[] = []
  readonly #target: FlightTarget
  // While lent out, ReadyForQuerys belong to the borrower's statements, up to the one that pg tells our flight of.
  #lend: { readonly user: RawUser; unanswered: number } | undefined
  #lent: 'no' | 'lent' | 'returning' | 'returned' = 'no'

  /** Opens one. `done` is called exactly once, never before this returns; what is returned gives the attempt up. */
  static open(
    config: pg.ClientConfig,
    names: StatementNames,
    expiresAt: number,
    done: (error: Error | undefined, connection?: Connection) => void,
  ): () => void {
    const { connectionTimeoutMillis: timeoutMillis = 10_000 } = config
    let client: Client
    let timeout: Error | undefined
    const giveUp = () => client.connection.stream.destroy()
    // pg's own timer would not wait for the event loop to read what has arrived while the app computed.
    const stopWatch = watch(timeoutMillis, () => {
      timeout = new Error(`Connection timeout: not open within ${timeoutMillis} ms`)
      giveUp()
    })
    try {
      client = new pg.Client({ ...config, connectionTimeoutMillis: 0 }) as unknown as Client
      // While connecting pg reports through the callback alone, but a socket can fail twice, and before that too.
      client.on('error', ignore)
      client.connection.stream.on('error', ignore)
      client.connect((error: Error | null) => {
        stopWatch()
        if (error === null || error === undefined) {
          const connection = new this(client, config, names.open(), expiresAt)
          client.off('error', ignore)
          done(undefined, connection)
          return
        }
        giveUp()
        done(timeout ?? error)
      })
    } catch (error) {
      // A certificate that cannot be read just now, a port that is none: pg throws instead of calling back.
      stopWatch()
      setImmediate(done, error as Error)
      return () => {}
    }
    return giveUp
  }

  protected constructor(client: Client, config: pg.ClientConfig, statements: PreparedStatements, expiresAt: number) {
    this.#client = client
    this.#statements = statements
    this.#config = config
    this.pid = client.processID
    this.expiresAt = expiresAt
    this.#target = {
      wire: packing(client.connection),
      statements,
      types: client._types,
      binary: client.binary,
      onFatal: (error) => this.#die(error, true),
      onTag: (tag) => this.#onCommand({ text: tag }),
    }
    client.pipeline = true
    client.on('error', (error: Error) => this.#die(error, false))
    client.connection.on('readyForQuery', ({ status }) => this.#ready(status))
  }

  /** The server's word about the transaction, as of its last ReadyForQuery. */
  get status(): TransactionStatus {
    // pg hands out a connection it has just opened before it notes the status that came with it.
    return this.#client.getTransactionStatus() ?? 'I'
  }

  /** Everything sent has been answered. */
  get quiet(): boolean {
    return this.#sent.length === 0
  }

  get expired(): boolean {
    return now() >= this.expiresAt
  }

  /** Sends the steps under one Sync. */
  send(steps: readonly Step[], listener: FlightListener): Flight | undefined {
    const flight = new Flight(steps, listener, this.#target)
    if (this.death !== undefined) {
      flight.lose(this.death, false)
      return undefined
    }
    this.#sent.push(flight)
    if (!this.isSerial || this.#sent.length === 1) this.#submit(flight)
    return flight
  }

  #submit(flight: Flight): void {
    this.#client.query(flight as unknown as pg.Submittable)
  }

  /** Sends DISCARD ALL. `done` when that has succeeded or was refused, not where the connection has died. */
  reset(timeoutMillis: number, done: (isClean: boolean) => void): void {
    this.isResetting = true
    this.sendWithin(timeoutMillis, 'DISCARD ALL', [new Step(DISCARD, ignore)], (alive, refusal) => {
      this.isResetting = false
      if (alive) done(refusal === undefined)
    })
  }

  /** Sends a bare Sync; true when it was answered in time. */
  ping(timeoutMillis: number, done: (alive: boolean) => void): void {
    this.sendWithin(timeoutMillis, 'a ping', [], done)
  }

  /** Sends the steps; true when they were answered in time. A connection that was late is dead from then on. */
  sendWithin(
    timeoutMillis: number,
    what: string,
    steps: readonly Step[],
    done: (alive: boolean, refusal?: Error) => void,
  ): void {
    const timer = setTimeout(() => {
      // One turn of the event loop before the verdict: the answer may lie there while the app computed.
      setImmediate(() => {
        if (pending) this.kill(new Error(`No answer to ${what} within ${timeoutMillis} ms`))
      })
    }, timeoutMillis)
    let pending = true
    const end = (alive: boolean, refusal?: Error) => {
      pending = false
      clearTimeout(timer)
      done(alive, refusal)
    }
    this.send(steps, { flightLanded: ({ error }) => end(true, error), flightLost: () => end(false) })
  }

  /** Has the server stop what this connection runs. See `cancelOnServer`. */
  cancel(timeoutMillis: number, done: (certain: boolean) => void): void {
    const { host, port, processID: pid, secretKey, ssl, sslNegotiation } = this.#client
    const target: CancelTarget = { host, port, pid, secretKey, ssl, sslNegotiation, stream: this.#config.stream }
    try {
      cancelOnServer(target, timeoutMillis, done)
    } catch {
      // The app's own `stream` function has thrown: not cancelled, which the caller handles.
      setImmediate(done, false)
    }
  }

  /**
   * The raw client for somebody who drives it alone: out of pipeline mode, in which pg refuses cursors and COPY.
   * Switched only while nothing is under way, else rows would reach the wrong query.
   */
  lend(user: RawUser): pg.Client {
    this.#lent = 'lent'
    this.#client.pipeline = false
    this.#client.connection.on('commandComplete', this.#onCommand)
    const lend = { user, unanswered: 0 }
    this.#lend = lend
    const isLent = () => this.#lent === 'lent' && this.#lend === lend
    // A borrower that keeps the client must not write between the statements of the connection's next user.
    return new Proxy(this.#client as unknown as pg.Client, {
      get(client, name) {
        const value: unknown = Reflect.get(client, name, client)
        if (typeof value !== 'function') return value
        return (...args: unknown[]) => {
          if (!isLent()) throw new NestedConflict('withClient(fn) is over: await what uses its client inside of fn')
          if (name !== 'query') return value.apply(client, args)
          const asked: unknown = value.apply(client, args)
          lend.unanswered++
          user.asked(textOf(args[0]))
          return asked
        }
      },
    })
  }

  /** Ends `lend`, behind what the borrower left under way; then `done` with the server's status, if it is still there. */
  takeBack(done: (status: TransactionStatus | undefined) => void): void {
    const listener = {
      flightLanded: (_: Flight, status: TransactionStatus) => done(status),
      flightLost: () => done(undefined),
    }
    this.#lent = 'returning'
    const flight = this.send([], listener)
    if (flight)
      flight.onReady = () => {
        this.#lent = 'returned'
      }
  }

  /** Ends it in good order; `done` when the server has hung up, or had its time to. */
  close(done: () => void): void {
    this.death ??= new Error('The connection was closed')
    this.#statements.end()
    const timer = setTimeout(() => this.#client.connection.stream.destroy(), GOODBYE_MILLIS)
    this.#client.end(() => {
      clearTimeout(timer)
      done()
    })
  }

  /** Ends it at once, answered or not. What was under way is lost with `reason`; `onDeath` is called. */
  kill(reason: Error): void {
    this.killed = true
    this.#die(reason, false)
  }

  /** Ends it at once without a word: nothing is under way that anybody waits for. */
  destroy(): void {
    this.onDeath = undefined
    this.#die(new Error('The connection was destroyed'), false)
  }

  // pg itself never notices that the names which its users gave are gone, and would use them.
  readonly #onCommand = ({ text }: { text: string }): void => {
    if (text === 'DISCARD ALL' || text === 'DEALLOCATE ALL') this.#client.connection.parsedStatements = {}
  }

  #ready(status: TransactionStatus): void {
    if (this.#lent === 'lent' || this.#lent === 'returning') {
      if (this.#lend !== undefined && --this.#lend.unanswered <= 0) this.#lend.user.answered()
      return
    }
    if (this.#lent === 'returned') {
      this.#lent = 'no'
      this.#client.pipeline = true
      this.#client.connection.off('commandComplete', this.#onCommand)
      this.#statements.forgetAll()
    }
    const landed = this.#sent.shift()
    const [next] = this.#sent
    if (this.isSerial && next !== undefined) this.#submit(next)
    landed?.land(status)
  }

  #die(death: Error, saidByServer: boolean): void {
    if (this.death !== undefined) return
    this.death = death
    this.#statements.end()
    // The socket, not end(): a half-open one would never answer a goodbye.
    this.#client.connection.stream.destroy()
    const sent = this.#sent
    this.#sent = []
    // The server answers in order: when it says goodbye in the middle of one flight, it has not begun the next.
    const reached = saidByServer || this.isSerial ? 1 : sent.length
    for (const [index, flight] of sent.entries()) flight.lose(death, index < reached)
    this.onDeath?.(death)
  }
}
