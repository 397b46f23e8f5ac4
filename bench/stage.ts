import type { BareCalls } from './bare.ts'
import { POOL_SIZE } from './contender.ts'
import type { LoadCalls } from './load.ts'
import { CONTENDERS, type Contender, type ContenderName, NETWORKS, type NetworkName } from './plan.ts'
import type { Child, Processes } from './processes.ts'
import type { ServerCalls } from './server.ts'
import type { SlowReaderCalls } from './slow-readers.ts'

/** A contender's server. */
export interface Server {
  readonly port: number
  usage(): Promise<{ cpuMicros: number; held: number }>
}

/** The processes that measure on one network. */
export class Stage {
  readonly load: Child<LoadCalls>
  /** For what is asked at the same time, so that it is not late because the other load is. */
  readonly secondLoad: Child<LoadCalls>
  readonly slowReaders: Child<SlowReaderCalls>
  /** Connections that do nothing but `select 1`. */
  readonly bare: Child<BareCalls>
  /** How long a `select 1` takes there, alone. */
  readonly roundTripMillis: number
  readonly #servers: ReadonlyMap<ContenderName, Server>

  private constructor(
    crew: Pick<Stage, 'load' | 'secondLoad' | 'slowReaders' | 'bare' | 'roundTripMillis'>,
    servers: ReadonlyMap<ContenderName, Server>,
  ) {
    this.load = crew.load
    this.secondLoad = crew.secondLoad
    this.slowReaders = crew.slowReaders
    this.bare = crew.bare
    this.roundTripMillis = crew.roundTripMillis
    this.#servers = servers
  }

  /** Starts everything; who started `processes` stops them. */
  static async open(
    processes: Processes,
    network: NetworkName,
    contenders: readonly ContenderName[],
    directly: string,
  ): Promise<Stage> {
    const connectionString = await throughProxy(processes, network, directly)
    const [load, secondLoad, slowReaders, bare, ...servers] = await Promise.all([
      processes.start<LoadCalls>('./load.ts'),
      processes.start<LoadCalls>('./load.ts'),
      processes.start<SlowReaderCalls>('./slow-readers.ts'),
      processes.start<BareCalls>('./bare.ts', { connectionString, connections: POOL_SIZE }),
      ...contenders.map((name) => startServer(processes, name, connectionString)),
    ])
    const perSecond = await bare.ask('loop', { connections: 1, warmUpMillis: 200, millis: 500 })
    const crew = { load, secondLoad, slowReaders, bare, roundTripMillis: 1000 / perSecond }
    return new Stage(crew, new Map(contenders.map((name, index) => [name, servers[index]!])))
  }

  server(name: ContenderName): Server {
    const server = this.#servers.get(name)
    if (!server) throw new Error(`${name} was not started`)
    return server
  }
}

async function throughProxy(processes: Processes, network: NetworkName, directly: string): Promise<string> {
  const delayMillis = NETWORKS[network]
  if (delayMillis === 0) return directly
  const url = new URL(directly)
  const proxy = await processes.start<Record<string, never>, number>('./proxy.ts', {
    port: Number(url.port),
    delayMillis,
  })
  url.port = String(await proxy.ready)
  return url.href
}

async function startServer(processes: Processes, name: ContenderName, connectionString: string): Promise<Server> {
  const { file, options = {} }: Contender = CONTENDERS[name]
  const argument = { contender: file, connectionString, options }
  const child = await processes.start<ServerCalls, number>('./server.ts', argument, `The server of ${name}`)
  return { port: await child.ready, usage: () => child.ask('usage') }
}
