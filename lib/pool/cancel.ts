import pg from 'pg'

/** What is needed to reach the server once more and name the backend whose statement is to stop. */
export interface CancelTarget {
  readonly host: string
  readonly port: number
  readonly pid: number
  readonly secretKey: number
  readonly ssl: unknown
  readonly sslNegotiation: string
  readonly stream: unknown
}

interface CancelWire {
  readonly stream: { destroy(): void }
  connect(portOrPath: number | string, host?: string): void
  requestSsl(): void
  cancel(pid: number, secretKey: number): void
  once(event: 'connect' | 'sslconnect' | 'end', listener: () => void): void
  on(event: 'error', listener: (error: Error) => void): void
}
const CancelConnection = pg.Connection as unknown as new (config: object) => CancelWire

/**
 * Asks the server, on a connection of its own, to cancel what the backend runs. `done(true)` once the server has closed
 * that connection: only then has the signal been raised, and a ROLLBACK sent after it is answered after it too, so that
 * no late signal can hit whoever uses the connection next. `done(false)` when that is not certain: destroy the connection.
 */
export function cancelOnServer(target: CancelTarget, timeoutMillis: number, done: (certain: boolean) => void): void {
  const { ssl, sslNegotiation, stream, host, port } = target
  const wire = new CancelConnection({ ssl, sslNegotiation, ...(stream !== undefined && { stream }) })
  let sent = false
  let failed = false
  const send = () => {
    sent = true
    wire.cancel(target.pid, target.secretKey)
  }
  const timer = setTimeout(() => {
    failed = true
    wire.stream.destroy()
  }, timeoutMillis)
  wire.on('error', () => {
    failed = true
  })
  wire.once('connect', () => {
    if (!ssl) send()
    else if (sslNegotiation !== 'direct') wire.requestSsl()
  })
  wire.once('sslconnect', send)
  wire.once('end', () => {
    clearTimeout(timer)
    done(sent && !failed)
  })
  if (host.startsWith('/')) wire.connect(`${host}/.s.PGSQL.${port}`)
  else wire.connect(port, host)
}
