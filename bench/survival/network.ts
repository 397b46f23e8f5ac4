import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'

/** What happens to a connection when a statement comes by: it is reset, falls silent, or loses what is answered. */
export type Fault = 'reset' | 'silence' | 'lost answer'

interface Line {
  readonly client: Socket
  readonly server: Socket
  silent: boolean
  losesAnswer: boolean
}

/** A network between an app and PostgreSQL that can fail. */
export class Network {
  readonly #listener = createServer((client) => this.#accept(client))
  readonly #lines = new Set<Line>()
  readonly #upstream: URL
  #trap: { readonly statement: string; readonly fault: Fault } | undefined

  constructor(connectionString: string) {
    this.#upstream = new URL(connectionString)
  }

  async open(): Promise<string> {
    this.#listener.listen(0, '127.0.0.1')
    await once(this.#listener, 'listening')
    const url = new URL(this.#upstream)
    url.port = String((this.#listener.address() as AddressInfo).port)
    return url.href
  }

  /** The next connection that sends such a statement gets the fault; once. */
  failAt(statement: 'COMMIT' | 'ROLLBACK', fault: Fault): void {
    this.#trap = { statement, fault }
  }

  /** Nothing gets through any more on the connections that are open now, and nobody is told. */
  silence(): void {
    for (const line of this.#lines) line.silent = true
  }

  async close(): Promise<void> {
    this.#listener.close()
    for (const { client, server } of this.#lines) {
      client.destroy()
      server.destroy()
    }
  }

  #accept(client: Socket): void {
    const server = connect({ host: this.#upstream.hostname, port: Number(this.#upstream.port) })
    const line: Line = { client, server, silent: false, losesAnswer: false }
    this.#lines.add(line)
    client.on('data', (chunk) => this.#toServer(line, chunk))
    server.on('data', (chunk) => {
      if (line.losesAnswer) client.destroy()
      else if (!line.silent) client.write(chunk)
    })
    for (const [one, other] of [
      [client, server],
      [server, client],
    ] as const) {
      one.setNoDelay(true)
      one.on('error', () => {})
      // A backend that ends is not heard of through a silent line, a client that gives up is.
      one.on('close', () => (line.silent && one === server ? undefined : other.destroy()))
    }
    client.on('close', () => this.#lines.delete(line))
  }

  #toServer(line: Line, chunk: Buffer): void {
    const fault = this.#faultOf(chunk)
    if (fault === 'silence') line.silent = true
    if (fault === 'lost answer') line.losesAnswer = true
    if (fault === 'reset') line.client.resetAndDestroy()
    else if (!line.silent) line.server.write(chunk)
  }

  #faultOf(chunk: Buffer): Fault | undefined {
    // In all protocols a statement is plain text, and one as short as this comes in one piece.
    if (!this.#trap || !chunk.toString('latin1').toUpperCase().includes(this.#trap.statement)) return undefined
    const { fault } = this.#trap
    this.#trap = undefined
    return fault
  }
}
