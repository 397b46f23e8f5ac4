import type { FastifyBaseLogger } from 'fastify'
import { withoutContext } from '../context.ts'
import { PoolClosed, PoolSaturated, PoolTimeout, type RequestDbError, sqlStateOf, Unavailable } from '../errors.ts'
import { Diagnosis } from '../observe/diagnosis.ts'
import type { ObservedPool, Snapshot, Who } from '../observe/snapshot.ts'
import type { EffectivePoolOptions } from '../options.ts'
import { Connection } from './connection.ts'
import { Ledger } from './ledger.ts'
import { type Borrower, CheckOut, type Lender, Loan, type SlotListener } from './loan.ts'
import { now, Queue } from './queue.ts'
import { NamedStatements, type StatementNames, UNNAMED } from './statements.ts'

const ignore = () => {}
const SILENT = { info: ignore, warn: ignore, error: ignore, debug: ignore } as unknown as FastifyBaseLogger

/** Sees how sessions end. */
export interface Inspector {
  /** A session ends; `unanswered` is the statement that nobody waited for, `isOpen` says that a nested transaction is. */
  ends(who: Who, unanswered: string | undefined, isOpen: boolean): void
  /** A callback of `afterCommit` is due. Where this is there, it is called by the inspector or by nobody. */
  due?(who: Who, callback: () => unknown): void
}

/**
 * The connections of one process to one database. SQLAlchemy: Engine with QueuePool. The queue grants slots in order;
 * a slot is the right to one connection, from the stack of idle ones or newly opened.
 */
export class Pool implements ObservedPool {
  readonly options: EffectivePoolOptions
  readonly ledger: Ledger
  readonly diagnosis: Diagnosis
  /** Who wants to know how sessions end: tests of apps. */
  inspector: Inspector | undefined
  readonly #queue: Queue<Connection>
  readonly #names: StatementNames
  readonly #open = new Set<Connection>()
  // The last one used is taken first: it needs no ping, and the others may grow old enough to be replaced.
  readonly #idle: Connection[] = []
  readonly #loans = new Map<Connection, Loan>()
  // COMMIT or ROLLBACK is on the wire, and nobody waits yet: the next who would have to may follow there.
  readonly #offers = new Set<Loan>()
  // How to give up each connection that is being opened or pinged, and the goodbyes that are not answered yet.
  readonly #connecting = new Map<CheckOut, { since: number; abort: () => void }>()
  readonly #goodbyes = new Set<Promise<void>>()
  readonly #slots: SlotListener = {
    slotGranted: (checkOut, left) => {
      if (left !== undefined) this.#deliver(checkOut, left)
      else this.#obtain(checkOut)
    },
    slotRefused: (checkOut, why) => {
      if (checkOut.over) checkOut.borrower.overdue(() => this.#refusal(why))
      else this.#refuse(checkOut, this.#refusal(why))
    },
  }
  readonly #lender: Lender = {
    offered: (loan) => this.#offer(loan),
    answered: (loan) => this.#loans.get(loan.connection)?.caughtUp(),
    caughtUp: (loan) => this.#queue.caughtUp(loan.checkOut),
    checkedIn: (loan) => {
      this.#end(loan)
      this.#put(loan.connection)
    },
  }
  #state: 'open' | 'closing' | 'closed' = 'open'
  #isClosing = false
  #graceEnds = 0
  #graceTimer: NodeJS.Timeout | undefined
  #onDrained: (() => void) | undefined

  constructor(options: EffectivePoolOptions, log: FastifyBaseLogger = SILENT) {
    this.options = options
    const { leakDetectionMillis, timeoutMillis } = options
    this.ledger = new Ledger(this, log, { leakDetectionMillis, windowMillis: Math.max(1000, timeoutMillis) })
    this.diagnosis = new Diagnosis(
      {
        pool: this,
        options,
        ledger: this.ledger,
        connecting: () => Array.from(this.#connecting.values(), ({ since }) => now() - since),
      },
      log,
    )
    this.#names = options.preparedStatements ? new NamedStatements(options.preparedStatements.cacheSize) : UNNAMED
    this.#queue = new Queue({
      capacity: options.size + options.maxOverflow,
      timeoutMillis: options.timeoutMillis,
      maxWaiting: options.maxWaiting,
    })
  }

  /** Asks for a connection. The borrower may be called before this returns. What is returned is for `cancel`. */
  checkOut(borrower: Borrower): CheckOut {
    const checkOut = new CheckOut(borrower, this.#slots)
    const offer = this.#queue.isFull ? this.#offerFor(checkOut) : undefined
    if (this.#isOver(borrower)) this.#refuse(checkOut, this.#reported(new PoolClosed(this.options.name)))
    else if (offer !== undefined) this.#handOver(offer, checkOut)
    else this.#queue.enter(checkOut)
    if (!checkOut.over) {
      this.ledger.waits(checkOut, borrower)
      if (this.#queue.waiting > 0) this.diagnosis.waits(checkOut, borrower)
    }
    return checkOut
  }

  /** The borrower wants none any more and will not be called. A connection that is being opened becomes an idle one. */
  cancel(checkOut: CheckOut): void {
    checkOut.over = true
    this.#queue.cancel(checkOut)
    this.ledger.waitsNoMore(checkOut, 'left')
  }

  /**
   * The server begins to close: everybody who waits, or will have to, is refused; free connections are still given out.
   * Sessions have `closeGraceMillis` from now on, as Fastify itself waits for their requests.
   */
  startClosing(): void {
    if (this.#graceTimer !== undefined) return
    this.#graceEnds = now() + this.options.closeGraceMillis
    this.#queue.close((waiter) => (waiter as CheckOut).borrower.isEnding)
    this.#graceTimer = setTimeout(() => {
      if (this.#state === 'open') this.#state = 'closing'
      this.#evictAll()
    }, this.options.closeGraceMillis)
  }

  /** Ends the pool: sessions get `closeGraceMillis`, then they are evicted. Nothing is left open. */
  async close(): Promise<void> {
    if (this.#isClosing) return
    this.#isClosing = true
    this.#state = 'closing'
    this.startClosing()
    this.#giveUpConnecting()
    await this.#drained(Math.max(0, this.#graceEnds - now()))
    clearTimeout(this.#graceTimer)
    this.#state = 'closed'
    this.#queue.close()
    this.#giveUpConnecting()
    this.#evictAll()
    // What is evicted has its own deadline for ROLLBACK, after which its connection is killed.
    await this.#drained(2 * this.options.settleTimeoutMillis)
    for (const connection of this.#idle.splice(0)) {
      this.ledger.closed(connection.pid, 'shutdown')
      this.#retire(connection)
    }
    for (const connection of this.#open) connection.destroy()
    this.#open.clear()
    await Promise.all([...this.#goodbyes, this.diagnosis.end()])
  }

  get name(): string {
    return this.options.name
  }

  /** More sessions wait than can be served at once. */
  get isCrowded(): boolean {
    return this.#queue.waiting > this.options.size + this.options.maxOverflow
  }

  snapshot(): Snapshot {
    const { name, size, maxOverflow } = this.options
    return {
      name,
      size,
      maxOverflow,
      open: this.#open.size,
      idle: this.#idle.length,
      checkedOut: this.#loans.size,
      overflow: Math.max(0, this.#open.size - size),
      waiting: this.#queue.waiting,
      holders: this.ledger.holders(),
      waiters: this.ledger.waiters(),
      totals: { ...this.ledger.totals },
    }
  }

  #evictAll(): void {
    for (const { borrower } of [...this.#loans.values()])
      borrower.evict(this.#reported(new PoolClosed(this.options.name)))
  }

  #giveUpConnecting(): void {
    for (const [{ borrower }, { abort }] of [...this.#connecting]) if (this.#isOver(borrower)) abort()
  }

  #isOver(borrower: Borrower): boolean {
    return this.#state === 'closed' || (this.#state === 'closing' && !borrower.isEnding)
  }

  #refusal(why: 'timeout' | 'saturated' | 'closed'): RequestDbError {
    const { name, size, maxOverflow, timeoutMillis } = this.options
    if (why === 'closed') return this.#reported(new PoolClosed(name))
    const { waiting } = this.#queue
    this.ledger.refused(why)
    const error =
      why === 'timeout'
        ? new PoolTimeout(size, maxOverflow, (timeoutMillis / 1000).toFixed(2), name)
        : new PoolSaturated(size, maxOverflow, waiting, name)
    error.headers = { 'retry-after': String(this.ledger.retryAfterSeconds(waiting)) }
    return this.#reported(error)
  }

  #reported(error: RequestDbError): RequestDbError {
    this.diagnosis.report(error)
    return error
  }

  // A slot is ours; find a connection for it.
  #obtain(checkOut: CheckOut): void {
    const { prePing, name } = this.options
    if (this.#isOver(checkOut.borrower)) {
      this.#leave()
      this.#refuse(checkOut, this.#reported(new PoolClosed(name)))
      return
    }
    const connection = this.#idle.pop()
    if (connection === undefined) this.#connect(checkOut)
    else if (connection.expired) {
      this.ledger.closed(connection.pid, 'recycled')
      this.#retire(connection, () => this.#obtain(checkOut))
    } else if (prePing && now() - connection.idleSince > prePing.idleMillis) {
      this.#ping(checkOut, connection, prePing.timeoutMillis)
    } else this.#deliver(checkOut, connection)
  }

  // Its connection has died before it was of use: in the slot that is still its own, with nobody before it.
  #obtainAgain(borrower: Borrower): CheckOut {
    const checkOut = new CheckOut(borrower, this.#slots)
    this.ledger.waits(checkOut, borrower)
    this.#obtain(checkOut)
    return checkOut
  }

  #ping(checkOut: CheckOut, connection: Connection, timeoutMillis: number): void {
    const abort = () => connection.kill(new Error('The pool was closed during a ping'))
    this.#connecting.set(checkOut, { since: now(), abort })
    connection.ping(timeoutMillis, (alive) => {
      this.#connecting.delete(checkOut)
      if (alive) {
        this.#deliver(checkOut, connection)
        return
      }
      this.ledger.totals.failedPings++
      this.#invalidateOlder()
      this.#obtain(checkOut)
    })
  }

  #connect(checkOut: CheckOut): void {
    const { connection, timeoutMillis, recycleMillis } = this.options
    const connectionTimeoutMillis = connection.connectionTimeoutMillis || timeoutMillis || 10_000
    const expiresAt = now() + recycleMillis * (0.9 + Math.random() * 0.2)
    const config = { ...connection, connectionTimeoutMillis }
    const since = now()
    const onEnd = (error: unknown, opened: Connection | undefined) => {
      this.#connecting.delete(checkOut)
      if (opened === undefined) this.#notOpened(checkOut, withText(error as Error), since)
      else this.#opened(checkOut, opened, since)
    }
    const abort = withoutContext(() => this.openConnection(config, this.#names, expiresAt, onEnd))
    this.#connecting.set(checkOut, { since, abort })
  }

  /** Opens a connection; `done` and what is returned are those of `Connection.open`. */
  protected openConnection(...how: Parameters<typeof Connection.open>): () => void {
    return Connection.open(...how)
  }

  #opened(checkOut: CheckOut, opened: Connection, since: number): void {
    this.ledger.opened(opened.pid, now() - since)
    this.#open.add(opened)
    opened.onDeath = (death) => this.#died(opened, death)
    this.diagnosis.opened()
    this.#deliver(checkOut, opened)
  }

  #notOpened(checkOut: CheckOut, cause: Error, since: number): void {
    this.ledger.notOpened(cause, now() - since)
    this.#leave()
    const { name } = this.options
    const isOver = this.#isOver(checkOut.borrower)
    this.#refuse(checkOut, this.#reported(isOver ? new PoolClosed(name) : new Unavailable(name, { cause })))
  }

  #refuse(checkOut: CheckOut, error: RequestDbError): void {
    if (checkOut.over) return
    checkOut.over = true
    this.ledger.waitsNoMore(checkOut, outcomeOf(error))
    checkOut.borrower.refused(error)
  }

  #deliver(checkOut: CheckOut, connection: Connection): void {
    if (checkOut.over || this.#isOver(checkOut.borrower)) {
      this.#put(connection)
      this.#refuse(checkOut, this.#reported(new PoolClosed(this.options.name)))
      return
    }
    checkOut.over = true
    const { borrower } = checkOut
    const holding = this.ledger.checkedOut(checkOut, borrower, connection.pid, !connection.quiet)
    const loan = new Loan(connection, checkOut, holding, this.#lender)
    this.#loans.set(connection, loan)
    connection.uses++
    // Whoever begins no transaction must not have a statement follow another, for the same reason as in `#canFollow`.
    connection.isSerial = this.options.pooler !== false && !borrower.canFollow
    connection.isDirty = this.options.resetOnReturn === 'discard'
    borrower.granted(loan)
  }

  // COMMIT or ROLLBACK of `loan` is on the wire.
  #offer(loan: Loan): void {
    const head = this.#queue.head as CheckOut | undefined
    if (head === undefined) {
      this.#offers.add(loan)
      // In the packet of COMMIT. Who follows before that is confirmed sends it once more, and depends on its own.
      if (loan.connection.isDirty) this.#reset(loan.connection)
    } else if (this.#canFollow(head, loan)) this.#handOver(loan, head)
  }

  #reset(connection: Connection): void {
    const { uses } = connection
    connection.reset(this.options.settleTimeoutMillis, (isClean) => {
      if (connection.uses === uses) connection.isDirty = !isClean
      const { onReset } = connection
      connection.onReset = undefined
      if (onReset !== undefined && !isClean) connection.destroy()
      onReset?.()
    })
  }

  #offerFor(checkOut: CheckOut): Loan | undefined {
    for (const offer of this.#offers) if (this.#canFollow(checkOut, offer)) return offer
    return undefined
  }

  // Who follows waits a little, which is not for who must not wait at all, nor for a pool that closes. PgBouncer can give
  // the server away between COMMIT's answer and the Sync of what has followed: the rest would go to another.
  #canFollow({ borrower }: CheckOut, { connection }: Loan): boolean {
    const { timeoutMillis, maxWaiting, pooler } = this.options
    const isWaitingFine = pooler === false && timeoutMillis > 0 && maxWaiting > 0 && this.#graceTimer === undefined
    return (
      isWaitingFine &&
      borrower.canFollow &&
      connection.canBeFollowed &&
      !connection.expired &&
      connection.death === undefined
    )
  }

  #handOver(loan: Loan, to: CheckOut): void {
    this.#end(loan, true)
    this.ledger.totals.handOvers++
    this.#queue.handOver(to, loan.connection)
  }

  #end(loan: Loan, isHandedOver = false): void {
    loan.end()
    this.#loans.delete(loan.connection)
    this.#offers.delete(loan)
    this.#queue.caughtUp(loan.checkOut)
    this.ledger.checkedIn(loan.holding, isHandedOver)
  }

  // A connection with its slot comes free: on to the next waiter, or to the idle ones, or away with it.
  #put(connection: Connection): void {
    if (connection.isResetting && connection.death === undefined) {
      connection.onReset = () => this.#put(connection)
      return
    }
    if (connection.death === undefined && (!connection.quiet || connection.status !== 'I')) connection.destroy()
    if (connection.death !== undefined) {
      this.ledger.invalidated(connection.pid, connection.death)
      this.#open.delete(connection)
      this.#leave()
    } else if (connection.expired) {
      this.ledger.closed(connection.pid, 'recycled')
      this.#retire(connection, () => this.#leave())
    } else if (this.#isToReset(connection)) {
      this.#reset(connection)
      connection.onReset = () => this.#put(connection)
    } else if (this.#queue.pass(connection)) {
      // It is the next one's, and no ping is needed: it has just answered.
    } else if (this.#open.size > this.options.size || this.#state !== 'open') {
      this.ledger.closed(connection.pid, this.#state === 'open' ? 'overflow' : 'shutdown')
      this.#retire(connection, () => this.#leave())
    } else {
      connection.idleSince = now()
      this.#idle.push(connection)
      this.#leave()
    }
  }

  // Whoever can follow another session sends DISCARD ALL itself, in front of its own BEGIN.
  #isToReset({ isDirty }: Connection): boolean {
    const head = this.#queue.head as CheckOut | undefined
    if (!isDirty || head?.borrower.canFollow) return false
    return head !== undefined || (this.#open.size <= this.options.size && this.#state === 'open')
  }

  // The slot, where there is one, stays taken until the server has hung up: never more backends than slots.
  #retire(connection: Connection, done: () => void = () => {}): void {
    this.#open.delete(connection)
    const goodbye = new Promise<void>((resolve) => connection.close(resolve)).then(() => {
      this.#goodbyes.delete(goodbye)
      done()
    })
    this.#goodbyes.add(goodbye)
  }

  #leave(): void {
    this.#queue.leave()
    if (this.#queue.taken === 0) this.#onDrained?.()
  }

  #died(connection: Connection, death: Error): void {
    this.#open.delete(connection)
    const idleAt = this.#idle.indexOf(connection)
    if (idleAt !== -1) this.#idle.splice(idleAt, 1)
    this.ledger.invalidated(connection.pid, death)
    const loan = this.#loans.get(connection)
    if (loan === undefined) {
      // It was about to be put back, and its slot is nobody's any more.
      if (connection.onReset !== undefined) this.#leave()
      return
    }
    if (!isSaidByServer(death)) this.#invalidateOlder()
    this.#end(loan)
    let isKept = false
    loan.borrower.lost(death, () => {
      isKept = true
      return this.#obtainAgain(loan.borrower)
    })
    if (!isKept) this.#leave()
  }

  /** A connection turned out dead without the server having said so: trust none that is as old. */
  #invalidateOlder(): void {
    for (const connection of this.#idle.splice(0)) {
      connection.destroy()
      this.#open.delete(connection)
      this.ledger.invalidated(connection.pid, connection.death)
    }
    for (const connection of this.#loans.keys()) connection.expiresAt = 0
  }

  /** Resolves when no slot is taken any more: nobody holds a connection, waits for one or has one opened. */
  async #drained(withinMillis: number): Promise<void> {
    if (this.#queue.taken === 0) return
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, withinMillis)
      this.#onDrained = () => {
        clearTimeout(timer)
        resolve()
      }
    })
    this.#onDrained = undefined
  }
}

// Killed by an administrator or a timeout: that says nothing of the other connections. A silent socket does.
function isSaidByServer(death: Error): boolean {
  return sqlStateOf(death) !== undefined
}

const OUTCOMES: Record<string, 'timeout' | 'saturated' | 'closed'> = {
  FST_REQUEST_DB_POOL_TIMEOUT: 'timeout',
  FST_REQUEST_DB_POOL_SATURATED: 'saturated',
  FST_REQUEST_DB_POOL_CLOSED: 'closed',
}
const outcomeOf = ({ code }: RequestDbError) => OUTCOMES[code] ?? 'failed'

// Node reports "refused on every address" as an AggregateError without a message.
function withText(error: Error): Error {
  if (!(error instanceof AggregateError) || error.message !== '') return error
  const reasons = error.errors.map((reason: Error) => reason.message).join('; ')
  return new Error(reasons, { cause: error })
}
