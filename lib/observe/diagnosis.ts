import type { FastifyBaseLogger } from 'fastify'
import type { RequestDbError } from '../errors.ts'
import type { EffectivePoolOptions } from '../options.ts'
import { type Capacity, checkCapacity, processesOf } from './capacity.ts'
import * as channels from './channels.ts'
import type { Facts, RouteUse, ServerView } from './facts.ts'
import { isTrackedFully, type Origin, trackFully } from './origin.ts'
import { ServerProbe } from './probe.ts'
import { makeReport, type Report, sentenceOf } from './report.ts'
import type { ObservedPool, Who } from './snapshot.ts'

/** Whose pool is looked at, and what is known of it. */
export interface Source {
  readonly pool: ObservedPool
  readonly options: EffectivePoolOptions
  readonly ledger: {
    readonly failedConnect: { readonly error: Error; readonly at: number } | undefined
    recent(): { routes: RouteUse[]; refused: number; millis: number }
    heldBy(party: Party): readonly unknown[]
    locate(key: object): unknown
  }
  /** How long each connection that is being opened or pinged has been so. */
  connecting(): number[]
}

interface Party {
  readonly who: Who
  readonly origin: Origin | undefined
}

// Whoever is refused within this time has the same report: under load one costs more than the refusal.
const SAME_MOMENT_MILLIS = 100
// One line for all that are refused for the same cause within this time.
const SAME_INCIDENT_MILLIS = 5000
const CHECK_WITHIN_MILLIS = 1000
const PROBE_AGAIN_MILLIS = 30_000

/** Finds out why there are no connections: makes the reports, and logs them. */
export class Diagnosis {
  readonly #source: Source
  readonly #log: FastifyBaseLogger
  readonly #probe: ServerProbe
  readonly #watchMillis: number
  #last: { code: string | undefined; cause: unknown; at: number; report: Report } | undefined
  readonly #logged = new Map<string, { at: number; unsaid: number }>()
  #watch: NodeJS.Timeout | undefined
  #view: { at: number; view: ServerView } | undefined
  #probing: Promise<void> | undefined
  #capacity: Capacity | undefined
  #checking: Promise<void> | undefined
  readonly #ending = new AbortController()

  constructor(source: Source, log: FastifyBaseLogger) {
    this.#source = source
    this.#log = log
    // Early enough for the answer, or its absence, to be there when the first one's time is over.
    this.#watchMillis = Math.min(1000, Math.max(20, source.options.timeoutMillis / 2))
    this.#probe = new ServerProbe(source.options.connection, Math.max(100, this.#watchMillis * 0.8))
    if (source.options.leakDetectionMillis !== false) trackFully()
  }

  /** Somebody has to wait. A request that waits for itself is told of at once: nobody else can end that. */
  waits(key: object, party: Party): void {
    this.#watch ??= this.#startWatch()
    const isSecond = party.who.requestId === ''
    if (!isSecond && party.origin === undefined) return
    const { ledger } = this.#source
    if (ledger.heldBy(party).length > 0) {
      ledger.locate(key)
      this.#tell(this.#reportOn(undefined, undefined), false)
    }
    if (isSecond && !isTrackedFully()) {
      ledger.locate(key)
      trackFully()
    }
  }

  /** A connection was opened: the first one shows whether there would be room for all. */
  opened(): void {
    const { options } = this.#source
    if (!options.capacityCheck || this.#checking !== undefined) return
    this.#checking = checkCapacity({
      config: options.connection,
      options,
      log: this.#log,
      timeoutMillis: CHECK_WITHIN_MILLIS,
      signal: this.#ending.signal,
    }).then((capacity) => {
      this.#capacity = capacity
    })
  }

  /** Gives an error its report, and logs that; not where the plugin itself wanted what has happened. */
  report(error: RequestDbError, isNews = true): void {
    const report = this.#reportOn(error.code, error.cause)
    Object.defineProperty(error, 'report', { value: report, configurable: true })
    if (isNews) this.#tell(report, true)
  }

  /** Ends with the pool. */
  async end(): Promise<void> {
    clearTimeout(this.#watch)
    this.#probe.end()
    this.#ending.abort()
    await Promise.all([this.#probing, this.#checking])
  }

  #startWatch(): NodeJS.Timeout {
    return setTimeout(() => {
      this.#watch = undefined
      const { waiters } = this.#source.pool.snapshot()
      if (waiters.length === 0) return
      this.#watch = this.#startWatch()
      const oldest = Math.max(...waiters.map(({ waitedMillis }) => waitedMillis))
      if (oldest >= this.#watchMillis / 2) this.#look()
    }, this.#watchMillis).unref()
  }

  // Only the server knows who waits for whose lock, and whether it is there at all. Once per incident.
  #look(): void {
    const { holders } = this.#source.pool.snapshot()
    const isRecent = this.#view !== undefined && performance.now() - this.#view.at < PROBE_AGAIN_MILLIS
    const stuck = holders.filter(({ state, stateMillis }) => state === 'busy' && stateMillis >= this.#watchMillis / 2)
    if (stuck.length === 0 || isRecent || this.#probing !== undefined) return
    this.#probing = this.#probe.look(holders.map(({ pid }) => pid)).then((view) => {
      this.#view = { at: performance.now(), view }
      this.#probing = undefined
    })
  }

  #reportOn(code: string | undefined, cause: unknown): Report {
    const at = performance.now()
    const last = this.#last
    if (last !== undefined && last.code === code && at - last.at < SAME_MOMENT_MILLIS && isLike(last.cause, cause)) {
      return last.report
    }
    const report = makeReport(this.#facts(code, cause, at))
    this.#last = { code, cause, at, report }
    const { pool } = this.#source
    if (channels.report.hasSubscribers) channels.report.publish({ pool, log: this.#log, report })
    return report
  }

  #facts(code: string | undefined, cause: unknown, at: number): Facts {
    const { pool, options, ledger, connecting } = this.#source
    const { failedConnect } = ledger
    const isRecent = this.#view !== undefined && at - this.#view.at < options.timeoutMillis + PROBE_AGAIN_MILLIS
    return {
      code,
      snapshot: pool.snapshot(),
      timeoutMillis: options.timeoutMillis,
      leakDetectionMillis: options.leakDetectionMillis,
      processes: processesOf(options.processes).count,
      connecting: connecting(),
      cause: cause instanceof Error ? cause : undefined,
      failedConnect: failedConnect && { error: failedConnect.error, agoMillis: at - failedConnect.at },
      recent: ledger.recent(),
      server: isRecent ? this.#view?.view : undefined,
      capacity: this.#capacity,
    }
  }

  #tell(report: Report, isRefusal: boolean): void {
    if (this.#probing === undefined) this.#say(report, isRefusal)
    // What the server is about to say may be the cause.
    else void this.#probing.then(() => this.#say(this.#reportOn(report.code, undefined), isRefusal))
  }

  #say(report: Report, isRefusal: boolean): void {
    const key = `${report.code} ${report.verdict?.cause}`
    const at = performance.now()
    const said = this.#logged.get(key)
    if (said !== undefined && at - said.at < SAME_INCIDENT_MILLIS) {
      if (isRefusal) said.unsaid++
      return
    }
    this.#logged.set(key, { at, unsaid: 0 })
    const since = said === undefined || said.unsaid === 0 ? {} : { refusedSinceLastReport: said.unsaid }
    const level = report.verdict === undefined ? 'info' : 'error'
    this.#log[level]({ requestDb: { event: 'report', ...report, ...since } }, sentenceOf(report))
  }
}

function isLike(one: unknown, other: unknown): boolean {
  const codeOf = (error: unknown) => (error as { code?: unknown } | undefined)?.code
  return one === other || (codeOf(one) === codeOf(other) && codeOf(one) !== undefined)
}
