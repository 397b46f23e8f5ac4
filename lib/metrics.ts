import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { Counter, Gauge, register as globalRegistry, Histogram, type Registry } from 'prom-client'
import { InvalidOption } from './errors.ts'
import { listen } from './observe/channels.ts'
import {
  BUCKETS,
  CAUSES,
  DURATIONS,
  type Duration,
  listenToDurations,
  OWN_READINGS,
  READINGS,
  type Reading,
} from './observe/meter.ts'
import { checkObserverOptions, decoratorCheck, poolOf } from './observe/registration.ts'
import type { ObservedPool, Snapshot } from './observe/snapshot.ts'

/** Options of `fastify.register(requestDbMetrics, options)`. */
export interface MetricsOptions {
  /** The `decorator` of the pool that is measured. Default `'db'`. */
  decorator?: string | undefined
  /** The registry of prom-client the metrics go to; several pools can share one. Default: prom-client's global one. */
  registry?: Registry | undefined
  /** Where the registry's metrics are served, such as `/metrics`. Default: nowhere. */
  path?: string | undefined
}

const POOL = 'db_client_connection_pool_name'
const STATE = 'db_client_connection_state'
const CAUSE = 'cause'
const REPORTS = 'fastify_request_db_reports_total'

const checks = {
  decorator: decoratorCheck,
  registry: {
    expected: 'a Registry of prom-client',
    test: (value: unknown) => typeof (value as Registry | null)?.getSingleMetric === 'function',
  },
  path: {
    expected: "a path such as '/metrics'",
    test: (value: unknown) => typeof value === 'string' && value.startsWith('/'),
  },
}

/** The pool's figures for Prometheus, through prom-client. @throws INVALID_OPTION */
async function measure(fastify: FastifyInstance, options: MetricsOptions): Promise<void> {
  const { decorator = 'db', registry = globalRegistry, path } = checkObserverOptions(options, checks)
  const pool = poolOf(fastify, decorator)
  const leave = Scoreboard.of(registry).add(pool)
  fastify.addHook('onClose', async () => leave())
  if (path === undefined) return
  fastify.get(path, async (_request, reply) => reply.type(registry.contentType).send(await registry.metrics()))
}

// By registry: the apps and pools of a process can share it.
const scoreboards = new WeakMap<Registry, Scoreboard>()

/** Our metrics in one registry, and the pools they are of. Pools of one name, from several apps, are added up. */
class Scoreboard {
  readonly #pools = new Set<ObservedPool>()
  readonly #durations: Readonly<Record<Duration, Histogram>>
  readonly #reports: Counter
  #snapshots: readonly Snapshot[] | undefined

  static of(registry: Registry): Scoreboard {
    const known = scoreboards.get(registry)
    // `registry.clear()` has thrown ours away too.
    if (known !== undefined && registry.getSingleMetric(REPORTS) === known.#reports) return known
    const scoreboard = new Scoreboard(registry)
    scoreboards.set(registry, scoreboard)
    return scoreboard
  }

  private constructor(registry: Registry) {
    for (const reading of [...READINGS, ...OWN_READINGS]) this.#register(reading, registry)
    const histogram = (duration: Duration) => {
      const { name, help } = DURATIONS[duration]
      return new Histogram({
        name: `${spell(name)}_seconds`,
        help,
        labelNames: [POOL],
        buckets: BUCKETS,
        registers: [registry],
      })
    }
    this.#durations = {
      createTime: histogram('createTime'),
      waitTime: histogram('waitTime'),
      useTime: histogram('useTime'),
    }
    this.#reports = new Counter({
      name: REPORTS,
      help: 'Reports on why there was no connection, by cause',
      labelNames: [POOL, CAUSE],
      registers: [registry],
    })
  }

  /** Measures this pool too. Returns how to stop it, and take away what was measured. @throws INVALID_OPTION */
  add(pool: ObservedPool): () => void {
    if (this.#pools.has(pool)) {
      throw new InvalidOption('decorator', 'a pool whose metrics are not in this registry yet', `'${pool.name}'`)
    }
    const labels = { [POOL]: pool.name }
    if (!this.#has(pool.name)) this.#startAtZero(labels)
    this.#pools.add(pool)
    const stopDurations = listenToDurations(pool, (duration, seconds) => {
      this.#durations[duration].observe(labels, seconds)
    })
    const stopReports = listen(pool, {
      report: ({ report }) => this.#reports.inc({ ...labels, [CAUSE]: report.verdict?.cause ?? 'none' }),
    })
    return () => {
      stopDurations()
      stopReports()
      this.#pools.delete(pool)
      if (!this.#has(pool.name)) this.#forget(labels)
    }
  }

  #has(name: string): boolean {
    return Array.from(this.#pools).some((pool) => pool.name === name)
  }

  // What appears only with its first event has no rate() for it.
  #startAtZero(labels: Record<string, string>): void {
    for (const histogram of Object.values(this.#durations)) histogram.zero(labels)
    for (const cause of CAUSES) this.#reports.inc({ ...labels, [CAUSE]: cause }, 0)
  }

  #forget(labels: Record<string, string>): void {
    for (const histogram of Object.values(this.#durations)) histogram.remove(labels)
    for (const cause of CAUSES) this.#reports.remove({ ...labels, [CAUSE]: cause })
  }

  #register({ name, help, isTotal, of }: Reading, registry: Registry): void {
    const read = () => this.#read(of)
    const common = { help, labelNames: [POOL, STATE], registers: [registry] }
    if (isTotal) {
      new Counter({
        ...common,
        name: `${spell(name)}_total`,
        collect() {
          this.reset()
          for (const [labels, value] of read()) this.inc(labels, value)
        },
      })
    } else {
      new Gauge({
        ...common,
        name: spell(name),
        collect() {
          this.reset()
          for (const [labels, value] of read()) this.inc(labels, value)
        },
      })
    }
  }

  #read(of: Reading['of']): [Record<string, string>, number][] {
    return this.#now().flatMap((snapshot) =>
      of(snapshot).map(({ value, state }): [Record<string, string>, number] => [
        { [POOL]: snapshot.name, ...(state && { [STATE]: state }) },
        value,
      ]),
    )
  }

  // All of our metrics are collected in one go, and should tell of one moment.
  #now(): readonly Snapshot[] {
    if (this.#snapshots === undefined) {
      this.#snapshots = Array.from(this.#pools, (pool) => pool.snapshot())
      queueMicrotask(() => {
        this.#snapshots = undefined
      })
    }
    return this.#snapshots
  }
}

/** A name of OpenTelemetry as Prometheus spells it. */
const spell = (name: string): string => name.replaceAll('.', '_')

/** The plugin: `await app.register(requestDbMetrics, { path })`, after `requestDb`. Needs `prom-client`. */
const plugin: FastifyPluginAsync<MetricsOptions> = fp(measure, {
  fastify: '^5.12.0',
  name: 'fastify-request-db-metrics',
})

export { plugin as default, plugin as requestDbMetrics, plugin as 'module.exports' }
