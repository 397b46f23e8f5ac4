import { once } from 'node:events'
import { type ClientHttp2Session, type ClientHttp2Stream, connect, constants } from 'node:http2'
import type { Test } from 'tap'
import { eventually } from './eventually.ts'
import { type Listener, listen } from './http-client.ts'

/** One request on an HTTP/2 connection. */
export interface Http2Request {
  readonly stream: ClientHttp2Stream
  /** Everything that has come of the body. */
  readonly received: () => string
  /** Status and body of the whole answer; rejects when the stream is reset. */
  response(): Promise<{ status: number; body: string }>
  /** RST_STREAM with CANCEL, as a browser sends it. */
  reset(): void
}

export class Http2Client {
  readonly session: ClientHttp2Session

  constructor(session: ClientHttp2Session) {
    this.session = session
  }

  send(method: string, path: string, options: { body?: unknown; endStream?: boolean } = {}): Http2Request {
    const { body, endStream = true } = options
    const stream = this.session.request(
      { ':method': method, ':path': path, ...(body !== undefined && { 'content-type': 'application/json' }) },
      { endStream: false },
    )
    stream.on('error', () => {})
    let status = 0
    let received = ''
    stream.on('response', (headers) => {
      status = Number(headers[':status'])
    })
    stream.setEncoding('utf8').on('data', (text: string) => {
      received += text
    })
    if (body !== undefined) stream.write(JSON.stringify(body))
    if (endStream) stream.end()
    return {
      stream,
      received: () => received,
      response: async () => {
        await eventually(() => stream.closed || stream.readableEnded, { withinMillis: 10_000 })
        if (stream.rstCode !== constants.NGHTTP2_NO_ERROR)
          throw new Error(`the stream was reset with ${stream.rstCode}`)
        return { status, body: received }
      },
      reset: () => stream.close(constants.NGHTTP2_CANCEL),
    }
  }
}

/** Connects, in cleartext, to an app made with `http2: true`; the connection is closed at the end of `t`. */
export async function openHttp2(t: Test, app: Listener): Promise<Http2Client> {
  const session = connect(`http://127.0.0.1:${await listen(app)}`)
  session.on('error', () => {})
  t.teardown(() => session.destroy())
  await once(session, 'connect')
  return new Http2Client(session)
}
