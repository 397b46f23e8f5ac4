import { once } from 'node:events'
import { createServer, type Server } from 'node:net'
import type { Test } from 'tap'
import { type Cut, PASS, ProxiedConnection, type Verdict, type Welcome } from './proxied-connection.ts'
import { type Flight, Recorder, type Recording } from './recorder.ts'
import { type Deed, type Moment, SetTrap, type Trap } from './trap.ts'
import type { Message } from './wire.ts'

export type { Flight, Recording }

/** A TCP proxy in front of PostgreSQL that reads along, and misbehaves on request. */
export class PostgresProxy {
  readonly #upstream: URL
  readonly #server: Server
  readonly #connections = new Set<ProxiedConnection>()
  readonly #traps: SetTrap[] = []
  #recordings: Recording[] = []
  #flights: Flight[] = []
  #roundTripsBefore = 0
  #delay = { toServer: 0, toClient: 0 }
  #hole: { direction: 'both' | 'toServer' | 'toClient'; passesClose: boolean } | undefined
  #silent = 0
  #fatal = { sqlState: '', message: '', left: 0 }
  #refusedParameters: readonly string[] = []
  #port = 0

  constructor(connectionString: string) {
    this.#upstream = new URL(connectionString)
    this.#server = createServer({ allowHalfOpen: true }, (client) => this.#accept(client))
  }

  /** As the server's, with the proxy's port. */
  get connectionString(): string {
    const url = new URL(this.#upstream)
    url.hostname = '127.0.0.1'
    url.port = String(this.#port)
    return url.href
  }

  get port(): number {
    return this.#port
  }

  /** Everyone who ever connected, cancel requests included, in order. */
  get recordings(): readonly Recording[] {
    return this.#recordings
  }

  /** The connections with a startup packet. */
  get sessions(): readonly Recording[] {
    return this.#recordings.filter((recording) => recording.kind === 'session')
  }

  /** The backends that cancel requests were for. */
  get cancels(): readonly number[] {
    return this.#recordings.filter(({ kind }) => kind === 'cancel').map(({ pid }) => pid ?? 0)
  }

  /** All flights since `clear()`, of all connections, in the order in which they began to arrive. */
  get flights(): readonly Flight[] {
    return this.#flights
  }

  /** The statements of each flight since `clear()`: `[['BEGIN', 'select 1'], ['COMMIT']]`. A ping is `[]`. */
  statements(): string[][] {
    return this.#flights.map(({ statements }) => [...statements])
  }

  /** Round trips of all connections since `clear()`, start-up not counted. */
  roundTrips(): number {
    return this.#allRoundTrips() - this.#roundTripsBefore
  }

  #allRoundTrips(): number {
    return this.#recordings.reduce((sum, { roundTrips }) => sum + roundTrips, 0)
  }

  /** Counts from here; connections and traps stay. */
  clear(): void {
    this.#flights = []
    this.#roundTripsBefore = this.#allRoundTrips()
  }

  /** For those that run for long: lets go what has been recorded, of connections that are closed altogether. */
  forget(): void {
    this.clear()
    this.#recordings = this.#recordings.filter(({ closed }) => !closed)
    for (const { flights } of this.#recordings) flights.length = 0
    this.#roundTripsBefore = this.#allRoundTrips()
  }

  /** Delays each direction from now on, for open and new connections. */
  delay(millis: number | { toServer?: number; toClient?: number }): void {
    const { toServer = 0, toClient = 0 } = typeof millis === 'number' ? { toServer: millis, toClient: millis } : millis
    this.#delay = { toServer, toClient }
    for (const connection of this.#connections) this.#applyDelay(connection)
  }

  #applyDelay({ toServer, toClient }: ProxiedConnection): void {
    toServer.delayMillis = this.#delay.toServer
    toClient.delayMillis = this.#delay.toClient
  }

  /**
   * A hole in the network: nothing gets through and nobody is told. `sockets: 'open'` only for the connections that
   * are open now, `'all'` for new ones too, until `restore()`. With `passesClose: false` the server is not even told
   * when the client closes its side.
   */
  swallow(
    options: { direction?: 'both' | 'toServer' | 'toClient'; sockets?: 'open' | 'all'; passesClose?: boolean } = {},
  ): void {
    const { direction = 'both', sockets = 'open', passesClose = true } = options
    for (const connection of this.#connections) connection.swallow(direction, passesClose)
    if (sockets === 'all') this.#hole = { direction, passesClose }
  }

  /** New connections get through again, and at once. What fell into a hole stays lost, its connections stay dead. */
  restore(): void {
    this.#hole = undefined
    this.#silent = 0
    this.#fatal.left = 0
    this.#refusedParameters = []
    this.delay(0)
  }

  /** Takes down the connections that are open, all or those that `which` picks. */
  cut(how: Cut, which: (recording: Recording) => boolean = () => true): void {
    for (const connection of this.#connections) if (which(connection.recorder.recording)) connection.cut(how)
  }

  /**
   * Waits for a message and does something about it, `before` the message goes on (the default) or `after`. `cut`
   * before the client's Parse of COMMIT: it never arrives; before the server's CommandComplete COMMIT: the answer is lost.
   */
  trap(moment: Moment, deed: Deed, options: { place?: 'before' | 'after'; times?: number } = {}): Trap {
    const { place = 'before', times = 1 } = options
    const trap = new SetTrap(moment, deed, place, times)
    this.#traps.push(trap)
    return trap
  }

  /** Takes back all traps. */
  disarm(): void {
    this.#traps.length = 0
  }

  /** Accepts the next `sockets` connections and says nothing to them. */
  silenceStartup(sockets = Number.POSITIVE_INFINITY): void {
    this.#silent = sockets
  }

  /** Answers the next `times` startup packets with a FATAL error, such as 57P03 or 53300. */
  failStartup(sqlState: string, times = Number.POSITIVE_INFINITY, message = `start-up refused with ${sqlState}`): void {
    this.#fatal = { sqlState, message, left: times }
  }

  /** Refuses startup packets that name one of these parameters, as PgBouncer does (08P01). */
  refuseParameters(...names: string[]): void {
    this.#refusedParameters = names
  }

  /** Nobody listens on the port any more: ECONNREFUSED. Open connections stay. */
  async refuse(): Promise<void> {
    if (this.#server.listening) this.#server.close()
  }

  /** Listens, on the same port as before. */
  async accept(): Promise<void> {
    if (this.#server.listening) return
    this.#server.listen(this.#port, '127.0.0.1')
    await once(this.#server, 'listening')
    const address = this.#server.address()
    if (address && typeof address === 'object') this.#port = address.port
  }

  async stop(): Promise<void> {
    await this.refuse()
    this.cut('end')
    for (const { client, upstream } of this.#connections) {
      client.destroy()
      upstream.destroy()
    }
  }

  #accept(client: ConstructorParameters<typeof ProxiedConnection>[0]): void {
    const recorder = new Recorder(this.#recordings.length + 1, (flight) => this.#flights.push(flight))
    this.#recordings.push(recorder.recording)
    const connection = new ProxiedConnection(client, recorder, {
      connect: (upstream) => upstream.connect(Number(this.#upstream.port || 5432), this.#upstream.hostname),
      welcome: (parameters) => this.#welcome(parameters),
      inspect: (from, side, message) => this.#inspect(from, side, message),
    })
    this.#connections.add(connection)
    const forget = () => client.destroyed && connection.upstream.destroyed && this.#connections.delete(connection)
    client.on('close', forget)
    connection.upstream.on('close', forget)
    this.#applyDelay(connection)
    if (this.#hole) connection.swallow(this.#hole.direction, this.#hole.passesClose)
  }

  #welcome(parameters: Record<string, string>): Welcome {
    if (this.#silent > 0) {
      this.#silent--
      return 'silence'
    }
    if (this.#fatal.left > 0) {
      this.#fatal.left--
      return this.#fatal
    }
    const refused = this.#refusedParameters.find((name) => name in parameters)
    return refused ? { sqlState: '08P01', message: `unsupported startup parameter: ${refused}` } : 'pass'
  }

  #inspect(connection: ProxiedConnection, from: 'client' | 'server', message: Message): Verdict {
    for (const trap of this.#traps) {
      const verdict = trap.verdict(connection, from, message)
      if (verdict) return verdict
    }
    return PASS
  }
}

/** A proxy in front of the server of `connectionString`, stopped at the end of `t`. */
export async function startProxy(t: Test, connectionString: string): Promise<PostgresProxy> {
  const proxy = new PostgresProxy(connectionString)
  await proxy.accept()
  t.teardown(() => proxy.stop())
  return proxy
}
