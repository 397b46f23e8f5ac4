import type { FastifyBaseLogger } from 'fastify'
import * as channels from '../observe/channels.ts'
import type { Lately } from '../observe/facts.ts'
import { LeakWatch } from '../observe/leak.ts'
import { CallSite, currentOrigin, isTracked, isTrackedFully, Origin, openerOf } from '../observe/origin.ts'
import type { HolderSnapshot, ObservedPool, Totals, WaiterSnapshot, Who } from '../observe/snapshot.ts'
import { now } from './queue.ts'
import { Recent } from './recent.ts'

/** Who asks for a connection, as far as the books are concerned. */
export interface Party {
  readonly who: Who
  readonly log: FastifyBaseLogger
  /** The request in which it was opened, where that is known. */
  readonly origin: Origin | undefined
}

// Within one millisecond of an answer it is nearly always the handler that waited for it that runs.
const SAME_TURN_MILLIS = 1

/**
 * The request that calls this. As long as requests are not followed, the best guess is the one that was answered by the
 * server a moment ago, if it still holds its connection: that is how a handler goes from `request.db` to a second session.
 */
export function callingOrigin(): Origin | undefined {
  if (isTracked()) return currentOrigin()
  const last = Holding.lastAnswered
  const isLikely = last?.isOver === false && !last.isBusy && last.who.requestId !== ''
  if (!isLikely || now() - last.idleSince > SAME_TURN_MILLIS) return undefined
  return new Origin(last.who)
}

/** One session's time with a connection. The session reports to it what it does there. */
export class Holding {
  static lastAnswered: Holding | undefined
  readonly party: Party
  readonly pid: number
  readonly waitedMillis: number
  readonly callSite: CallSite | undefined
  /** When somebody began to look at it as a leak (monotonic); 0 not yet. */
  suspectedAt = 0
  #since = now()
  #endedAt = 0
  #busySince = 0
  #idleSince = this.#since
  #busyMillis = 0
  #statements = 0
  #lastStatement: string | undefined
  inTransaction = false
  /** Its session has ended, or is about to: it comes back without anybody's help. */
  isEnding = false

  constructor(party: Party, pid: number, waitedMillis = 0, callSite?: CallSite) {
    this.party = party
    this.pid = pid
    this.waitedMillis = waitedMillis
    this.callSite = callSite
  }

  get who(): Who {
    return this.party.who
  }

  get statements(): number {
    return this.#statements
  }

  /** The last statement of the app. */
  get lastStatement(): string | undefined {
    return this.#lastStatement
  }

  get isBusy(): boolean {
    return this.#busySince !== 0
  }

  get isOver(): boolean {
    return this.#endedAt !== 0
  }

  /** Since when the server has been waiting for the app. */
  get idleSince(): number {
    return this.#idleSince
  }

  /** When the server last answered something; 0 when it has not yet. */
  get answeredAt(): number {
    return this.#idleSince === this.#since ? 0 : this.#idleSince
  }

  /** `statements` of the app leave for the server. */
  busy(statements: number, last: string): void {
    if (this.#busySince === 0) this.#busySince = now()
    this.#statements += statements
    if (statements > 0) this.#lastStatement = last
  }

  /** `statements` were not run after all, and will be sent again. */
  again(statements: number): void {
    this.#statements -= statements
  }

  /** The server has answered all. */
  idle(): void {
    if (this.#busySince === 0) return
    this.#idleSince = now()
    this.#busyMillis += this.#idleSince - this.#busySince
    this.#busySince = 0
    Holding.lastAnswered = this
  }

  end(at: number): void {
    this.#endedAt = at
  }

  heldMillis(at: number): number {
    return (this.#endedAt || at) - this.#since
  }

  busyMillis(at: number): number {
    return this.#busyMillis + (this.#busySince === 0 ? 0 : (this.#endedAt || at) - this.#busySince)
  }

  snapshot(at: number): HolderSnapshot {
    const { who, origin } = this.party
    const heldMillis = this.heldMillis(at)
    const busyMillis = this.busyMillis(at)
    const openedBy = openerOf(who, origin)
    const answeredAt = origin?.answeredAt ?? 0
    return {
      method: who.method,
      route: who.route,
      requestId: who.requestId,
      pid: this.pid,
      heldMillis,
      busyMillis,
      idleMillis: Math.max(0, heldMillis - busyMillis),
      state: this.isBusy ? 'busy' : 'idle',
      stateMillis: at - (this.#busySince || this.#idleSince),
      statements: this.#statements,
      lastStatement: this.#lastStatement,
      inTransaction: this.inTransaction,
      ...(openedBy && { openedBy }),
      ...(answeredAt > 0 && { answeredMillis: at - answeredAt }),
      ...(this.callSite && { callSite: this.callSite.toString() }),
    }
  }
}

interface Waiting {
  readonly party: Party
  readonly since: number
  callSite: CallSite | undefined
}

/** Who holds what since when, who waits, and the counts. Whoever listens hears of it from here. */
export class Ledger {
  readonly holdings = new Set<Holding>()
  readonly #pool: ObservedPool
  readonly #log: FastifyBaseLogger
  readonly #leaks: LeakWatch
  readonly #recent: Recent
  readonly #waiters = new Map<object, Waiting>()
  readonly totals: Totals = {
    checkouts: 0,
    handOvers: 0,
    timeouts: 0,
    saturated: 0,
    opened: 0,
    failedConnects: 0,
    closed: 0,
    recycled: 0,
    invalidated: 0,
    failedPings: 0,
    cancels: 0,
    replays: 0,
    commits: 0,
    rollbacks: 0,
    failedCommits: 0,
  }
  // The usual time between two check-ins, for Retry-After: a moving average over about ten.
  #gapMillis = 0
  #lastCheckIn = 0
  // Of what is given back, and of connections that were opened.
  #answeredAt = 0
  /** The last attempt to open a connection, if it failed. */
  failedConnect: { error: Error; at: number } | undefined

  constructor(
    pool: ObservedPool,
    log: FastifyBaseLogger,
    options: { leakDetectionMillis: number | false; windowMillis: number },
  ) {
    this.#pool = pool
    this.#log = log
    this.#leaks = new LeakWatch(pool, options.leakDetectionMillis)
    this.#recent = new Recent(options.windowMillis, now())
  }

  waits(key: object, party: Party): void {
    this.#waiters.set(key, { party, since: now(), callSite: isTrackedFully() ? new CallSite() : undefined })
  }

  /** For who waits: where it was asked for. */
  locate(key: object): CallSite | undefined {
    const waiting = this.#waiters.get(key)
    if (waiting !== undefined) waiting.callSite ??= new CallSite()
    return waiting?.callSite
  }

  /** Why it waits no more. Returns how long it has waited. */
  waitsNoMore(key: object, outcome: channels.WaitEvent['outcome']): number {
    const waiting = this.#waiters.get(key)
    if (waiting === undefined) return 0
    this.#waiters.delete(key)
    const waitedMillis = now() - waiting.since
    if (channels.wait.hasSubscribers) {
      const { who, log } = waiting.party
      channels.wait.publish({ pool: this.#pool, log, who, waitedMillis, outcome })
    }
    return waitedMillis
  }

  checkedOut(key: object, party: Party, pid: number, isHandedOver: boolean): Holding {
    const waiting = this.#waiters.get(key)
    const waitedMillis = this.waitsNoMore(key, 'granted')
    const callSite = waiting?.callSite ?? (isTrackedFully() ? new CallSite() : undefined)
    const holding = new Holding(party, pid, waitedMillis, callSite)
    this.holdings.add(holding)
    this.totals.checkouts++
    this.#leaks.checkedOut(holding)
    if (channels.checkout.hasSubscribers) {
      const { who, log } = party
      channels.checkout.publish({ pool: this.#pool, log, who, pid, waitedMillis, isHandedOver })
    }
    return holding
  }

  checkedIn(holding: Holding, isHandedOver: boolean): void {
    this.holdings.delete(holding)
    const at = now()
    holding.end(at)
    this.#leaks.checkedIn(holding)
    if (this.#lastCheckIn !== 0) {
      const gap = at - this.#lastCheckIn
      this.#gapMillis = this.#gapMillis === 0 ? gap : this.#gapMillis * 0.9 + gap * 0.1
    }
    this.#lastCheckIn = at
    this.#answeredAt = Math.max(this.#answeredAt, holding.answeredAt)
    const { who, party, statements, pid } = holding
    const heldMillis = holding.heldMillis(at)
    const busyMillis = holding.busyMillis(at)
    this.#recent.add(party.origin?.who ?? who, heldMillis, busyMillis, statements, at)
    if (channels.checkin.hasSubscribers) {
      const { log } = party
      channels.checkin.publish({ pool: this.#pool, log, who, pid, heldMillis, busyMillis, statements, isHandedOver })
    }
  }

  refused(why: 'timeout' | 'saturated'): void {
    this.totals[why === 'timeout' ? 'timeouts' : 'saturated']++
    this.#recent.refuse(now())
  }

  opened(pid: number, millis: number): void {
    this.totals.opened++
    this.failedConnect = undefined
    this.#answeredAt = now()
    if (channels.connect.hasSubscribers) {
      channels.connect.publish({ pool: this.#pool, log: this.#log, pid, millis, error: undefined })
    }
  }

  notOpened(error: Error, millis: number): void {
    this.totals.failedConnects++
    this.failedConnect = { error, at: now() }
    if (channels.connect.hasSubscribers) {
      channels.connect.publish({ pool: this.#pool, log: this.#log, pid: undefined, millis, error })
    }
  }

  closed(pid: number, why: channels.CloseEvent['why']): void {
    this.totals[why === 'recycled' ? 'recycled' : 'closed']++
    if (channels.close.hasSubscribers) channels.close.publish({ pool: this.#pool, log: this.#log, pid, why })
  }

  invalidated(pid: number, error: Error | undefined): void {
    this.totals.invalidated++
    if (channels.invalidate.hasSubscribers) {
      channels.invalidate.publish({ pool: this.#pool, log: this.#log, pid, error })
    }
  }

  /** When the server last answered anything (monotonic). */
  answeredAt(): number {
    return Array.from(this.holdings).reduce((at, holding) => Math.max(at, holding.answeredAt), this.#answeredAt)
  }

  /** Backends held by requests of which it is known which other sessions they open. */
  followed(): Set<number> {
    return new Set(Array.from(this.holdings).flatMap(({ party, pid }) => (party.origin === undefined ? [] : pid)))
  }

  /** Connections that the request of `party` holds already, and that will not come back by themselves. */
  heldBy(party: Party): Holding[] {
    return Array.from(this.holdings).filter((holding) => !holding.isEnding && isSameRequest(holding.party, party))
  }

  /** Seconds until the queue of `waiting` has probably been served, from 1 to 60. */
  retryAfterSeconds(waiting: number): number {
    return Math.min(60, Math.max(1, Math.ceil((waiting * this.#gapMillis) / 1000)))
  }

  recent(): Lately {
    return this.#recent.read(now())
  }

  holders(): HolderSnapshot[] {
    const at = now()
    return Array.from(this.holdings, (holding) => holding.snapshot(at))
  }

  waiters(): WaiterSnapshot[] {
    const at = now()
    return Array.from(this.#waiters.values(), ({ party, since, callSite }) => {
      const { method, route, requestId } = party.who
      const openedBy = openerOf(party.who, party.origin)
      return {
        method,
        route,
        requestId,
        waitedMillis: at - since,
        holds: this.heldBy(party).map(({ pid }) => pid),
        ...(openedBy && { openedBy }),
        ...(callSite && { callSite: callSite.toString() }),
      }
    })
  }
}

function isSameRequest(holder: Party, waiter: Party): boolean {
  if (holder.who === waiter.who && holder.who.requestId !== '') return true
  for (let origin = waiter.origin; origin !== undefined; origin = origin.parent) {
    if (holder.origin === origin || holder.who === origin.who) return true
  }
  return false
}
