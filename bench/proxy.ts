import { once } from 'node:events'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { argumentOfParent, serveParent } from './child.ts'

/*
 * A network between a server and PostgreSQL: every chunk arrives `delayMillis` after it was sent, in either direction.
 * Since the delay is the same for all of them, those of all connections stand in one line, in the order of their
 * arrival, and one timer waits for the first. Nothing is merged, reordered or let through early; what Node's timers are
 * late, which is up to a millisecond, everybody is late.
 */

export interface ProxyArgument {
  readonly port: number
  readonly delayMillis: number
}

interface Parcel {
  readonly dueAt: number
  readonly to: Socket
  /** Nothing: the sender has closed its side. */
  readonly chunk: Buffer | undefined
}

const { port, delayMillis } = argumentOfParent<ProxyArgument>()
let underWay: Parcel[] = []
let awaited = false

function send(to: Socket, chunk?: Buffer): void {
  underWay.push({ dueAt: performance.now() + delayMillis, to, chunk })
  if (!awaited) waitFor(delayMillis)
}

function waitFor(millis: number): void {
  awaited = true
  setTimeout(deliver, millis)
}

function deliver(): void {
  const now = performance.now()
  const late = underWay.findIndex(({ dueAt }) => dueAt > now)
  const due = late === -1 ? underWay : underWay.slice(0, late)
  underWay = late === -1 ? [] : underWay.slice(late)
  for (const { to, chunk } of due) {
    if (chunk) to.write(chunk)
    else to.end()
  }
  const next = underWay[0]
  if (next) waitFor(next.dueAt - now)
  else awaited = false
}

function forward(from: Socket, to: Socket): void {
  from.setNoDelay(true)
  from.on('data', (chunk) => send(to, chunk))
  from.on('end', () => send(to))
  from.on('error', () => to.destroy())
}

const server = createServer({ allowHalfOpen: true }, (client) => {
  const upstream = connect({ port, host: '127.0.0.1', allowHalfOpen: true })
  forward(client, upstream)
  forward(upstream, client)
})
server.listen(0, '127.0.0.1')
await once(server, 'listening')
serveParent({}, (server.address() as AddressInfo).port)
