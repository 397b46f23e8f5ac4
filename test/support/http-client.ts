import { type AddressInfo, connect, type Socket } from 'node:net'
import type { Test } from 'tap'
import { eventually } from './eventually.ts'

export interface HttpResponse {
  readonly status: number
  readonly headers: Record<string, string>
  readonly body: string
}

/** A Fastify app of any kind: HTTP/1.1 or HTTP/2. */
export interface Listener {
  readonly server: { readonly listening: boolean; address(): AddressInfo | string | null }
  listen(options: { host: string; port: number }): Promise<string>
}

/** Makes the app listen on a free port of the loopback, where it does not listen yet, and returns the port. */
export async function listen(app: Listener): Promise<number> {
  if (!app.server.listening) await app.listen({ host: '127.0.0.1', port: 0 })
  const address = app.server.address()
  if (!address || typeof address !== 'object') throw new Error('The app does not listen on a port')
  return address.port
}

/** One HTTP/1.1 connection, byte by byte in the test's hands. */
export class HttpClient {
  readonly socket: Socket
  #received: Buffer = Buffer.alloc(0)
  readonly #methods: string[] = []

  constructor(port: number) {
    // Half-open, so that a test can close its own direction and still read.
    this.socket = connect({ host: '127.0.0.1', port, allowHalfOpen: true })
    this.socket.on('data', (chunk: Buffer) => {
      this.#received = Buffer.concat([this.#received, chunk])
    })
    this.socket.on('error', () => {})
  }

  /**
   * Writes a request; several in a row are pipelined. An object as `body` is sent as JSON. With `withhold`, the last
   * so many bytes of the body are never sent: an upload that hangs.
   */
  send(method: string, path: string, options: { body?: unknown; headers?: object; withhold?: number } = {}): this {
    const { body, headers = {}, withhold = 0 } = options
    const text = body === undefined ? '' : typeof body === 'string' ? body : JSON.stringify(body)
    const lines = Object.entries({
      host: '127.0.0.1',
      ...(body !== undefined && { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) }),
      ...headers,
    }).map(([name, value]) => `${name}: ${value}\r\n`)
    this.#methods.push(method)
    const bytes = Buffer.from(text)
    this.socket.write(
      Buffer.concat([
        Buffer.from(`${method} ${path} HTTP/1.1\r\n${lines.join('')}\r\n`),
        bytes.subarray(0, bytes.length - withhold),
      ]),
    )
    return this
  }

  /** Everything that has come and was not taken by `response()`. */
  get received(): string {
    return this.#received.toString('latin1')
  }

  get closed(): boolean {
    return this.socket.destroyed || this.socket.readableEnded
  }

  /** Waits until `text` has come, such as a status line or the first row of a stream. */
  receives(text: string, withinMillis = 5000): Promise<void> {
    return eventually(() => this.received.includes(text), {
      withinMillis,
      describe: () => `'${text}' did not come within ${withinMillis} ms, only '${this.received}'`,
    })
  }

  /** Takes the next whole response; rejects if the connection ends before it is whole. */
  async response(withinMillis = 10_000): Promise<HttpResponse> {
    const method = this.#methods.shift() ?? 'GET'
    let parsed: { response: HttpResponse; length: number } | undefined
    await eventually(
      () => {
        parsed = parse(this.#received, method)
        return parsed !== undefined || this.closed
      },
      { withinMillis, describe: () => `no whole response within ${withinMillis} ms, only '${this.received}'` },
    )
    if (!parsed) throw new Error(`the connection ended before the response was whole: '${this.received}'`)
    this.#received = this.#received.subarray(parsed.length)
    return parsed.response
  }

  /** Leaves as a browser does that closes the tab: FIN, and whatever still comes is answered with RST. */
  destroy(): void {
    this.socket.destroy()
  }

  /** Leaves with RST. */
  reset(): void {
    if (this.socket.writableEnded) this.socket.destroy()
    else this.socket.resetAndDestroy()
  }

  /** Sends FIN and goes on reading. */
  halfClose(): void {
    this.socket.end()
  }

  /** Stops reading, until `resume()`. */
  pause(): void {
    this.socket.pause()
  }

  resume(): void {
    this.socket.resume()
  }
}

/** Connects to the app, which is made to listen if it does not yet; the connection is closed at the end of `t`. */
export async function openHttp(t: Test, app: Listener): Promise<HttpClient> {
  const client = new HttpClient(await listen(app))
  t.teardown(() => client.destroy())
  await new Promise<void>((resolve, reject) => client.socket.once('connect', resolve).once('error', reject))
  return client
}

function parse(bytes: Buffer, method: string): { response: HttpResponse; length: number } | undefined {
  const headEnd = bytes.indexOf('\r\n\r\n')
  if (headEnd === -1) return undefined
  const [statusLine = '', ...lines] = bytes.toString('latin1', 0, headEnd).split('\r\n')
  const status = Number(statusLine.split(' ')[1])
  const headers = Object.fromEntries(
    lines.map((line) => [line.slice(0, line.indexOf(':')).toLowerCase(), line.slice(line.indexOf(':') + 1).trim()]),
  )
  const start = headEnd + 4
  const done = (body: string, length: number) => ({ response: { status, headers, body }, length })
  if (method === 'HEAD' || status === 204 || status === 304) return done('', start)
  if (headers['transfer-encoding'] === 'chunked') return parseChunks(bytes, start, done)
  const length = start + Number(headers['content-length'] ?? 0)
  return bytes.length < length ? undefined : done(bytes.toString('utf8', start, length), length)
}

function parseChunks<Result>(bytes: Buffer, start: number, done: (body: string, length: number) => Result) {
  const pieces: Buffer[] = []
  let at = start
  while (true) {
    const lineEnd = bytes.indexOf('\r\n', at)
    if (lineEnd === -1) return undefined
    const size = Number.parseInt(bytes.toString('latin1', at, lineEnd), 16)
    const next = lineEnd + 2 + size + 2
    if (bytes.length < next) return undefined
    if (size === 0) return done(Buffer.concat(pieces).toString('utf8'), next)
    pieces.push(bytes.subarray(lineEnd + 2, lineEnd + 2 + size))
    at = next
  }
}
