import type { Message } from './wire.ts'
import { boundStatement, cancelledPid, parsedStatement, startupParameters, textOf } from './wire.ts'

/** What arrived up to one Sync (or as one simple query), and what the server said to it. */
export interface Flight {
  /** Which connection of the recording, from 1. */
  readonly connection: number
  /** The letters of its messages in order, such as `PBEHPBDES`. */
  messages: string
  /** The statements it runs: the text of each Parse, or that of the named statement a Bind uses again. */
  readonly statements: string[]
  /** Pieces it arrived in: 1 means it left in one write. */
  chunks: number
  bytes: number
  /** CommandComplete tags, such as `BEGIN` and `SELECT 1`. */
  readonly tags: string[]
  /** SQLSTATEs. */
  readonly errors: string[]
  /** Transaction status of the ReadyForQuery that answered it; undefined as long as it is not answered. */
  status?: 'I' | 'T' | 'E'
}

/** One connection that came through the proxy. */
export interface Recording {
  readonly id: number
  /** `session` after a startup packet, `cancel` after a cancel request, `silent` before either. */
  kind: 'silent' | 'session' | 'cancel'
  /** Of a cancel request: the backend it is for. Of a session: its backend, once the server has said it. */
  pid?: number
  /** user, database, application_name, … */
  parameters: Record<string, string>
  askedForTls: boolean
  readonly flights: Flight[]
  /** How often the client spoke after the server had: what the client waited for. Start-up is not counted. */
  roundTrips: number
  /** The client said goodbye (Terminate). */
  terminated: boolean
  /** Its client socket is gone. */
  closed: boolean
}

/** Listens to one connection. Both directions report here what they have read. */
export class Recorder {
  readonly recording: Recording
  readonly #names = new Map<string, string>()
  readonly #onFlight: (flight: Flight) => void
  #open: Flight | undefined
  #unanswered: Flight[] = []
  #serverSpokeLast = true
  #ready = false

  constructor(id: number, onFlight: (flight: Flight) => void) {
    this.#onFlight = onFlight
    this.recording = {
      id,
      kind: 'silent',
      parameters: {},
      askedForTls: false,
      flights: [],
      roundTrips: 0,
      terminated: false,
      closed: false,
    }
  }

  /** A chunk from the client, cut into messages. */
  fromClient(messages: readonly Message[]): void {
    const touched = new Set<Flight>()
    for (const message of messages) {
      const flight = this.#clientMessage(message)
      if (flight) touched.add(flight)
    }
    for (const flight of touched) flight.chunks++
    if (touched.size > 0 && this.#serverSpokeLast) {
      this.recording.roundTrips++
      this.#serverSpokeLast = false
    }
  }

  #clientMessage(message: Message): Flight | undefined {
    const { recording } = this
    if (message.type === 'startup') {
      recording.kind = 'session'
      recording.parameters = startupParameters(message)
    } else if (message.type === 'cancel') {
      recording.kind = 'cancel'
      recording.pid = cancelledPid(message)
    } else if (message.type === 'ssl' || message.type === 'gssenc') {
      recording.askedForTls = true
    } else if (message.type === 'X') {
      recording.terminated = true
    } else if (message.type !== 'p') {
      return this.#partOfFlight(message)
    }
    return undefined
  }

  #partOfFlight(message: Message): Flight {
    // COPY data follows the flight that started the COPY.
    const isCopyData = 'dcf'.includes(message.type) && this.#open === undefined
    const flight = (isCopyData ? this.recording.flights.at(-1) : this.#open) ?? this.#begin()
    flight.messages += message.type
    flight.bytes += message.raw.length
    if (message.type === 'P') {
      const { name, text } = parsedStatement(message)
      this.#names.set(name, text)
      flight.statements.push(text)
    } else if (message.type === 'B') {
      const name = boundStatement(message)
      const known = this.#names.get(name)
      // A Bind right after its Parse runs what is on the list already.
      if (flight.messages.at(-2) !== 'P' && known !== undefined) flight.statements.push(known)
    } else if (message.type === 'Q') {
      flight.statements.push(textOf(message, 'client'))
    }
    if (message.type === 'S' || message.type === 'Q') this.#open = undefined
    return flight
  }

  #begin(): Flight {
    const flight: Flight = {
      connection: this.recording.id,
      messages: '',
      statements: [],
      chunks: 0,
      bytes: 0,
      tags: [],
      errors: [],
    }
    this.#open = flight
    this.#unanswered.push(flight)
    this.recording.flights.push(flight)
    this.#onFlight(flight)
    return flight
  }

  fromServer(messages: readonly Message[]): void {
    for (const message of messages) {
      if (message.type === 'K') this.recording.pid = message.body.readInt32BE(0)
      if (message.type === 'C') this.#unanswered[0]?.tags.push(textOf(message, 'server'))
      if (message.type === 'E') this.#unanswered[0]?.errors.push(textOf(message, 'server'))
      if (message.type === 'Z') this.#answered(textOf(message, 'server') as NonNullable<Flight['status']>)
    }
    this.#serverSpokeLast = true
  }

  #answered(status: NonNullable<Flight['status']>): void {
    // The first ReadyForQuery ends the start-up and answers no flight.
    if (this.#ready) {
      const flight = this.#unanswered.shift()
      if (flight) flight.status = status
    }
    this.#ready = true
  }
}
