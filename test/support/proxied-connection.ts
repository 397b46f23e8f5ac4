import { Socket } from 'node:net'
import { Lane } from './lane.ts'
import type { Recorder } from './recorder.ts'
import { fatalResponse, type Message, MessageReader, startupParameters } from './wire.ts'

/** How a connection is taken down: both sides closed in order, or reset. */
export type Cut = 'end' | 'reset'

/** What becomes of a new connection once it has said who it is. */
export type Welcome = 'pass' | 'silence' | { readonly sqlState: string; readonly message: string }

/** What a connection asks the proxy. */
export interface Rules {
  connect(upstream: Socket): void
  welcome(parameters: Record<string, string>): Welcome
  /** Called for every message before it goes on; may act on the connection and say what becomes of the message. */
  inspect(connection: ProxiedConnection, from: 'client' | 'server', message: Message): Verdict
}

/** Does `act` before or after the message goes on. */
export interface Verdict {
  readonly place: 'before' | 'after'
  readonly act: () => void
}

/** One client's connection: two sockets, a lane each way, and the recorder. */
export class ProxiedConnection {
  readonly client: Socket
  readonly upstream = new Socket({ allowHalfOpen: true })
  readonly toServer = new Lane(this.upstream)
  readonly toClient: Lane
  readonly recorder: Recorder
  /** With false, the server never learns that the client closed a half-open connection. */
  passesClose = true
  readonly #rules: Rules
  #clientEnded = false

  constructor(client: Socket, recorder: Recorder, rules: Rules) {
    this.client = client
    this.recorder = recorder
    this.toClient = new Lane(client)
    this.#rules = rules
    for (const socket of [client, this.upstream]) {
      socket.setNoDelay(true)
      socket.on('error', () => {})
    }
    const fromClient = new MessageReader('frontend')
    client.on('data', (chunk: Buffer) => {
      const messages = fromClient.push(chunk)
      recorder.fromClient(messages)
      this.#forward(messages, 'client')
    })
    client.on('end', () => this.#clientIsGone())
    client.on('close', () => {
      recorder.recording.closed = true
      this.#clientIsGone()
    })
    const fromServer = new MessageReader('backend')
    this.upstream.on('data', (chunk: Buffer) => {
      const messages = fromServer.push(chunk)
      recorder.fromServer(messages)
      this.#forward(messages, 'server')
    })
    this.upstream.on('end', () => this.upstream.end())
    this.upstream.on('close', () => this.toClient.enter('end'))
  }

  get gone(): boolean {
    return this.client.destroyed
  }

  #clientIsGone(): void {
    if (this.#clientEnded) return
    this.#clientEnded = true
    if (!this.toServer.swallows) this.toServer.enter('end')
    else if (this.passesClose) this.cut('end')
  }

  #forward(messages: readonly Message[], from: 'client' | 'server'): void {
    const lane = from === 'client' ? this.toServer : this.toClient
    // What came in one piece goes on in one piece, unless something happens in the middle of it.
    let piece: Buffer[] = []
    const flush = () => {
      lane.enter(Buffer.concat(piece))
      piece = []
    }
    for (const message of messages) {
      if (from === 'client' && this.#isGreeting(message)) continue
      const verdict = this.#rules.inspect(this, from, message)
      if (verdict.place === 'after') piece.push(message.raw)
      if (verdict !== PASS) {
        flush()
        verdict.act()
      }
      if (verdict.place === 'before') piece.push(message.raw)
    }
    flush()
  }

  /** Answers what comes before the conversation; true where the message goes no further. */
  #isGreeting(message: Message): boolean {
    if (message.type === 'ssl' || message.type === 'gssenc') {
      this.client.write('N')
      return true
    }
    if (message.type === 'cancel') this.#rules.connect(this.upstream)
    if (message.type !== 'startup') return false
    const welcome = this.#rules.welcome(startupParameters(message))
    if (welcome === 'pass') this.#rules.connect(this.upstream)
    else if (welcome === 'silence') this.swallow('both')
    else this.client.end(fatalResponse(welcome.sqlState, welcome.message))
    return welcome !== 'pass'
  }

  swallow(direction: 'both' | 'toServer' | 'toClient', passesClose = true): void {
    if (direction !== 'toClient') this.toServer.swallows = true
    if (direction !== 'toServer') this.toClient.swallows = true
    this.passesClose = passesClose
  }

  cut(how: Cut): void {
    this.toServer.close()
    this.toClient.close()
    for (const socket of [this.client, this.upstream]) {
      if (how === 'end') socket.destroySoon()
      // A socket that is told to reset while its FIN is under way is never closed, and Node then spins at its exit.
      else if (socket.connecting || !socket.remotePort || socket.writableEnded) socket.destroy()
      else socket.resetAndDestroy()
    }
  }
}

/** The message goes on, and that is all. */
export const PASS: Verdict = { place: 'after', act: () => {} }
