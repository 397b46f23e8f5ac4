import type { FastifyBaseLogger } from 'fastify'
import type { RequestDbError } from '../errors.ts'
import type { EffectivePoolOptions } from '../options.ts'
import { type Capacity, checkCapacity, processesOf } from './capacity.ts'
import * as channels from './channels.ts'
import type { AgedView, Facts, Lately, ServerView } from './facts.ts'
import { isTrackedFully, type Origin, trackFully } from './origin.ts'
import { ServerProbe } from './probe.ts'
import { makeReport, type Report, sentenceOf } from './report.ts'
import type { HolderSnapshot, ObservedPool, Who } from './snapshot.ts'

/** Whose pool is looked at, and what is known of it. */
export interface Source {
  readonly pool: ObservedPool
  readonly options: EffectivePoolOptions
  readonly ledger: {
    readonly failedConnect: { readonly error: Error; readonly at: number } | undefined
    recent(): Lately
    answeredAt(): number
    followed(): ReadonlySet<number>
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

// These may have been refused for something that only the server knows.
const REFUSALS = new Set(['FST_REQUEST_DB_POOL_TIMEOUT', 'FST_REQUEST_DB_POOL_SATURATED'])
// Whoever is refused within this time has the same report: under load one costs more than the refusal.
const SAME_MOMENT_MILLIS = 100
// One line for all that are refused for the same cause within this time.
const SAME_INCIDENT_MILLIS = 5000
const CHECK_WITHIN_MILLIS = 1000
// How long the server has for an answer to the probe, and to be believed in what it said.
const PROBE_WITHIN_MILLIS = 1000
const VIEW_KEPT_MILLIS = 30_000
// Busy for so long, a statement may be waiting for something.
const STUCK_MILLIS = 100

/** Finds out why there are no connections: makes the reports, and logs them. */
export class Diagnosis {
  readonly #source: Source
  readonly #log: FastifyBaseLogger
  readonly #probe: ServerProbe
  readonly #watchMillis: number
  #last: Finding | undefined
  readonly #logged = new Map<string, { at: number; unsaid: number }>()
  #watch: NodeJS.Timeout | undefined
  #view: Sight | undefined
  #probing: Promise<void> | undefined
  #probedAt = 0
  #capacity: Capacity | undefined
  #checking: Promise<void> | undefined
  readonly #ending = new AbortController()

  constructor(source: Source, log: FastifyBaseLogger) {
    this.#source = source
    this.#log = log
    // Early enough for the answer, or its absence, to be there when the first one's time is over.
    this.#watchMillis = Math.min(1000, Math.max(20, source.options.timeoutMillis / 2))
    this.#probe = new ServerProbe(source.options.connection, PROBE_WITHIN_MILLIS)
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
      this.#tell(this.#findingOn(undefined, undefined))
    }
    if (isSecond && !isTrackedFully()) {
      ledger.locate(key)
      trackFully()
    }
  }

  /** A connection was opened: the first one shows whether there would be room for all. */
  opened(): void {
    const { options } = this.#source
    if (!options.capacityCheck || options.pooler !== false || this.#checking !== undefined) return
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
    // Where nobody waits for long, nobody has looked before.
    if (REFUSALS.has(error.code)) this.#look(STUCK_MILLIS)
    const finding = this.#findingOn(error.code, error.cause)
    attach(error, finding.report)
    if (isNews) this.#tell(finding, error)
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
      const { holders, waiters } = this.#source.pool.snapshot()
      if (waiters.length === 0) return
      this.#watch = this.#startWatch()
      const oldest = Math.max(...waiters.map(({ waitedMillis }) => waitedMillis))
      if (oldest < this.#watchMillis / 2) return
      this.#look(this.#watchMillis / 2)
      // It could be that they wait for themselves. The next ones will be known.
      if (holders.every(({ state, stateMillis }) => state === 'idle' && stateMillis >= oldest / 2)) trackFully()
    }, this.#watchMillis).unref()
  }

  // Only the server knows who waits for whose lock, and whether it is there at all. It is asked again only about what
  // it cannot have seen.
  #look(stuckMillis: number): void {
    const at = performance.now()
    // A pooler has pids of its own, which are nobody's to PostgreSQL, or somebody else's.
    if (this.#source.options.pooler !== false) return
    if (this.#probing !== undefined || at - this.#probedAt < Math.max(PROBE_WITHIN_MILLIS, this.#watchMillis)) return
    const { holders } = this.#source.pool.snapshot()
    const seenMillis = this.#view === undefined ? Number.POSITIVE_INFINITY : at - this.#view.at
    const isNew = holders.some(({ state, stateMillis }) => {
      return state === 'busy' && stateMillis >= stuckMillis && stateMillis < seenMillis
    })
    if (!isNew) return
    this.#probedAt = at
    this.#probing = this.#probe.look(holders.map(({ pid }) => pid)).then((view) => {
      this.#view = { at, holders, view }
      this.#probing = undefined
    })
  }

  // An answer that has not come is one too, after a while.
  #serverView(at: number): AgedView | undefined {
    const agoMillis = at - this.#probedAt
    if (this.#probing !== undefined && agoMillis >= Math.max(STUCK_MILLIS, this.#watchMillis * 0.7)) {
      return { backends: [], holders: [], error: new Error(`No answer within ${Math.round(agoMillis)} ms`), agoMillis }
    }
    if (this.#view === undefined || at - this.#view.at > VIEW_KEPT_MILLIS) return undefined
    return agedBy(this.#view, at)
  }

  #findingOn(code: string | undefined, cause: unknown): Finding {
    const at = performance.now()
    const last = this.#last
    if (last !== undefined && last.code === code && at - last.at < SAME_MOMENT_MILLIS && isLike(last.cause, cause)) {
      return last
    }
    const facts = this.#facts(code, cause, at)
    const report = makeReport(facts)
    this.#last = { code, cause, at, facts, report, final: undefined }
    const { pool } = this.#source
    if (channels.report.hasSubscribers) channels.report.publish({ pool, log: this.#log, report })
    return this.#last
  }

  #facts(code: string | undefined, cause: unknown, at: number): Facts {
    const { pool, options, ledger, connecting } = this.#source
    const { failedConnect } = ledger
    return {
      code,
      snapshot: pool.snapshot(),
      timeoutMillis: options.timeoutMillis,
      pooler: options.pooler,
      leakDetectionMillis: options.leakDetectionMillis,
      processes: processesOf(options.processes).count,
      connecting: connecting(),
      cause: cause instanceof Error ? cause : undefined,
      failedConnect: failedConnect && { error: failedConnect.error, agoMillis: at - failedConnect.at },
      recent: ledger.recent(),
      server: this.#serverView(at),
      answeredMillis: at - ledger.answeredAt(),
      followed: ledger.followed(),
      capacity: this.#capacity,
    }
  }

  /** Logs it, for an error where somebody was refused. */
  #tell(finding: Finding, error?: RequestDbError): void {
    if (this.#probing === undefined) {
      this.#say(finding.report, error !== undefined)
      return
    }
    // What the server is about to say may be the cause.
    finding.final ??= this.#probing.then(() => this.#lookAgain(finding))
    void finding.final.then((report) => {
      if (error !== undefined) attach(error, report)
      this.#say(report, error !== undefined)
    })
  }

  /** As it was then, with what the server has said since. */
  #lookAgain({ facts, report, at }: Finding): Report {
    if (this.#view === undefined) return report
    const server = agedBy(this.#view, at)
    const answeredMillis = at - this.#source.ledger.answeredAt()
    return { ...makeReport({ ...facts, server, answeredMillis }), at: report.at }
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

/** What the server was seen to do, and by whom. */
interface Sight {
  readonly at: number
  readonly holders: readonly HolderSnapshot[]
  readonly view: ServerView
}

const agedBy = ({ at, holders, view }: Sight, now: number): AgedView => ({ ...view, holders, agoMillis: now - at })

/** A report, and what it was made of. */
interface Finding {
  readonly code: string | undefined
  readonly cause: unknown
  readonly at: number
  readonly facts: Facts
  readonly report: Report
  /** With what the server was asked meanwhile. */
  final: Promise<Report> | undefined
}

// Not enumerable: it names routes and SQL, and is neither for clients nor for whoever logs the error.
function attach(error: RequestDbError, report: Report): void {
  Object.defineProperty(error, 'report', { value: report, configurable: true })
}

function isLike(one: unknown, other: unknown): boolean {
  const codeOf = (error: unknown) => (error as { code?: unknown } | undefined)?.code
  return one === other || (codeOf(one) === codeOf(other) && codeOf(one) !== undefined)
}
