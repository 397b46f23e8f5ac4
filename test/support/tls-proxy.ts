import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { TLSSocket } from 'node:tls'
import type { Test } from 'tap'
import { makeCertificate } from './certificate.ts'

const SSL_REQUEST = 80877103
const CANCEL_REQUEST = 80877102

/** PostgreSQL behind TLS, as at most who rent one have it. `cert` is what a client must trust. */
export interface TlsProxy {
  readonly port: number
  readonly cert: string
  /** How many connections spoke TLS, and how many of them asked to cancel something. */
  readonly counts: { secure: number; cancels: number }
}

/** Ends TLS in front of the server of `connectionString`; refuses who does not speak it. Stopped at the end of `t`. */
export async function startTlsProxy(t: Test, connectionString: string): Promise<TlsProxy> {
  const { hostname, port } = new URL(connectionString)
  const { key, cert } = makeCertificate()
  const counts = { secure: 0, cancels: 0 }
  const open = new Set<Socket>()
  const server = createServer(async (socket) => {
    open.add(socket.on('error', () => {}))
    const [first] = (await once(socket, 'data')) as [Buffer]
    socket.pause()
    // A client that negotiates directly begins with TLS's own hello.
    const isDirect = first[0] === 0x16
    if (isDirect) socket.unshift(first)
    else if (first.readInt32BE(4) !== SSL_REQUEST) return socket.destroy()
    else socket.write('S')
    counts.secure++
    const secure = new TLSSocket(socket, { isServer: true, key, cert, ALPNProtocols: ['postgresql'] })
    secure.on('error', () => {})
    secure.once('data', (packet: Buffer) => {
      if (packet.readInt32BE(4) === CANCEL_REQUEST) counts.cancels++
      const upstream = connect(Number(port), hostname).on('error', () => secure.destroy())
      open.add(upstream)
      upstream.write(packet)
      secure.pipe(upstream).pipe(secure)
    })
  })
  t.teardown(() => {
    server.close()
    for (const socket of open) socket.destroy()
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  return { port: (server.address() as AddressInfo).port, cert, counts }
}
