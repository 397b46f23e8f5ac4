import type { FastifyBaseLogger } from 'fastify'
import { ConnectionLost, type RequestDbError, SessionEnded, sqlStateOf, TransactionAborted } from '../errors.ts'
import { hasWaitedInPooler } from '../observe/behind-pooler.ts'
import * as channels from '../observe/channels.ts'
import type { Origin } from '../observe/origin.ts'
import type { Who } from '../observe/snapshot.ts'
import { DISCARD, type Flight, type FlightListener, Step, type TransactionStatus } from '../pool/flight.ts'
import type { Holding } from '../pool/ledger.ts'
import type { Borrower, CheckOut, Loan } from '../pool/loan.ts'
import type { Pool } from '../pool/pool.ts'
import { now } from '../pool/queue.ts'
import { endsTransaction, tellLanded, tellLost } from './outcome.ts'

const COMMIT = { text: 'COMMIT', fixed: true }
const ROLLBACK = { text: 'ROLLBACK', fixed: true }
// How long what runs may finish by itself before it is cancelled: a cancel costs a connection of its own.
const CANCEL_AFTER_MILLIS = 50
const CANCEL_AGAIN_MILLIS = 500
const LENT_CANCELS = 3
const IN_FAILED_TRANSACTION = '25P02'

/** Whose link it is: how its transactions begin, and who is told when it is cut. */
export interface LinkOwner {
  readonly who: Who
  readonly log: FastifyBaseLogger
  readonly origin: Origin | undefined
  /** Where somebody wants to know how long it waited, held and was busy. */
  readonly holdings: Holding[] | undefined
  /** The BEGIN statement; undefined sends every statement on its own and keeps the connection only meanwhile. */
  readonly beginSql: string | undefined
  readonly maxSessionMillis: number | false
  /** The statement that sets the transaction's run-time parameters, asked for once per transaction. */
  settings(): Step | undefined
  /** The session must end now: it held its connection for too long, or the pool closes. */
  onEvict(reason: RequestDbError): void
  /** It has waited too long behind another session, which is as if it had never been given a connection: take a new link. */
  onOverdue(): void
}

/**
 * A unit of work's way to the server: at most one connection, at most one transaction at a time.
 *
 * | phase    | connection | what is sent now                                                        |
 * | -------- | ---------- | ----------------------------------------------------------------------- |
 * | idle     | none       | asks for a connection and boards the first flight                       |
 * | boarding | asked for  | boards the first flight                                                 |
 * | departed | ours       | is held until BEGIN is answered: before, it might run outside of it     |
 * | open     | ours       | leaves at once                                                          |
 * | lost     | died       | is refused with CONNECTION_LOST until `reset`                           |
 */
export class Link implements Borrower, FlightListener {
  readonly pool: Pool
  readonly #owner: LinkOwner
  /** The server has answered BEGIN. */
  inTransaction = false
  /** Why the transaction cannot be committed where the server does not know it: lost, or ended behind our back. */
  doom: RequestDbError | undefined
  #phase: 'idle' | 'boarding' | 'departed' | 'open' | 'lost' = 'idle'
  #failed = false
  #checkOut: CheckOut | undefined
  #loan: Loan | undefined
  #settings: Step | undefined
  #boarded: Step[] = []
  // The app's part of the first flight.
  #first: Step[] = []
  #held: Step[][] = []
  #replayable = true
  #replaying = false
  #underWay = 0
  // Who needs the connection of a link without transactions between statements too.
  #pins = 0
  #refusal: unknown
  // COMMIT or ROLLBACK, from its boarding to its answer.
  #final: Step | undefined
  #finalPid = 0
  #cancelling: Promise<void> | undefined
  #hasCancelled = false
  #hasLeft = false
  #isLent = false
  #deadline: NodeJS.Timeout | undefined
  #maxTimer: NodeJS.Timeout | undefined
  #onChange: (() => void)[] = []

  constructor(pool: Pool, owner: LinkOwner) {
    this.pool = pool
    this.#owner = owner
  }

  get who(): Who {
    return this.#owner.who
  }

  get log(): FastifyBaseLogger {
    return this.#owner.log
  }

  get origin(): Origin | undefined {
    return this.#owner.origin
  }

  /** Whether every transaction is begun and ended by us. */
  get isTransactional(): boolean {
    return this.#owner.beginSql !== undefined
  }

  get isIdle(): boolean {
    return this.#phase === 'idle'
  }

  /** A connection is asked for, and what is to be sent waits for it. */
  get isBoarding(): boolean {
    return this.#phase === 'boarding'
  }

  /** The transaction can only be rolled back. */
  get isFailed(): boolean {
    return this.#failed || this.doom !== undefined
  }

  /** Everything sent has been answered. */
  get isQuiet(): boolean {
    return this.#underWay === 0 && this.#phase !== 'boarding' && this.#phase !== 'departed'
  }

  /** The last statement of the app, where its answer has not come. */
  get unanswered(): string | undefined {
    if (this.#phase === 'boarding' || this.#phase === 'departed') {
      const steps = this.#phase === 'boarding' ? this.#boarded : this.#first
      return steps.findLast((step) => step.spec.describe)?.spec.text
    }
    return this.#underWay > 0 ? this.#loan?.holding.lastStatement : undefined
  }

  /** What was asked for last never got a connection, for this reason. */
  get refusal(): unknown {
    return this.#refusal
  }

  /** COMMIT or ROLLBACK is boarded or sent: a connection it waits for is not refused while the pool closes. */
  get isEnding(): boolean {
    return this.#final !== undefined
  }

  // Sending

  /** Sends the steps under one Sync, now or when it can be. Each is told its outcome, and nobody else. */
  post(steps: Step[], final?: Step): void {
    // Behind its own COMMIT it would run in nobody's transaction, or in the next session's.
    if (this.#final !== undefined) for (const step of steps) step.settle(this.#endedError())
    else this.#post(steps, final)
  }

  #post(steps: Step[], final: Step | undefined): void {
    this.#final = final
    if (this.doom !== undefined) for (const step of steps) step.settle(this.doom)
    else if (this.#phase === 'idle') this.#board(steps)
    else if (this.#phase === 'boarding') this.#boarded.push(...steps)
    else if (this.#phase === 'departed') this.#held.push(steps)
    else this.#sendAll(steps)
  }

  /** Sends the steps that `make` makes; resolves when the one that was given `settle` has its answer. */
  posted(make: (settle: (error: unknown) => void) => Step[]): Promise<void> {
    return new Promise((resolve, reject) => {
      this.post(make((error) => (error === undefined ? resolve() : reject(error))))
    })
  }

  /** Sends the steps and has a connection, with a transaction where there are any, and nothing under way on it. */
  async take(steps: Step[]): Promise<void> {
    this.post(steps)
    await this.quietOrDoomed()
    const error = this.doom ?? this.#refusal
    if (error !== undefined) throw error
  }

  /** Sends COMMIT behind `steps`, with no cancel under way. `done` with the error, if any, and what it did; `settleTimeoutMillis` runs from its sending. */
  commit(steps: Step[], done: (error: unknown, tag: string | undefined) => void): void {
    this.#end(COMMIT, steps, done)
  }

  #end(spec: Step['spec'], steps: Step[], done: (error: unknown, tag: string | undefined) => void): void {
    const channel = spec === COMMIT ? channels.commit : channels.rollback
    const since = channel.hasSubscribers ? now() : 0
    const final: Step = new Step(spec, (error, { tag }) => {
      this.disarm()
      this.#final = undefined
      if (since > 0) this.#tellEnd(channel, spec === COMMIT ? tag : 'ROLLBACK', error, since)
      done(error, tag)
    })
    steps.push(final)
    this.post(steps, final)
  }

  #tellEnd(channel: typeof channels.commit, tag: string | undefined, failure: unknown, since: number): void {
    const { pool, who, log } = this
    const isRefused = failure === undefined && tag !== 'COMMIT' && channel === channels.commit
    const error = isRefused ? new Error('COMMIT was answered by ROLLBACK') : (failure as Error | undefined)
    channel.publish({ pool, log, who, pid: this.#finalPid, millis: now() - since, error })
  }

  /** Resolves when everything sent has been answered, or no answer can save it any more. */
  quietOrDoomed(): Promise<void> {
    return this.#until(() => this.isQuiet || this.doom !== undefined)
  }

  /** Resolves when the connection is given back. */
  returned(): Promise<void> {
    return this.#until(() => this.#phase === 'idle')
  }

  // Ending

  /** The session is over: what it holds comes back without anybody's help. */
  over(): void {
    if (this.#loan !== undefined) this.#loan.holding.isEnding = true
  }

  /** Nothing more will be sent: gives up waiting for a connection, refuses what waited with it. */
  leaveQueue(reason: () => RequestDbError): void {
    this.#hasLeft = true
    if (this.#checkOut !== undefined) this.pool.cancel(this.#checkOut)
    if (this.#phase !== 'boarding') return
    const loan = this.#loan
    this.refused(reason())
    // It was handed over in this very moment. What is under way on it is another's, so it has to be waited for.
    if (loan?.isBehind) this.#depart(this.#owner.beginSql as string, loan)
  }

  /** Leaves nothing behind on the connection, or kills it. Resolves with what went wrong. `isReset`: not by the app's word. */
  async rollBack(isReset = true): Promise<unknown> {
    let error: unknown
    if (this.#loan === undefined) return undefined
    this.arm('ROLLBACK')
    await this.#stop(CANCEL_AFTER_MILLIS)
    if (this.#loan !== undefined && this.#loan.connection.status !== 'I') {
      this.doom = undefined
      if (isReset && channels.reset.hasSubscribers) {
        const { pool, log, who } = this
        channels.reset.publish({ pool, log, who, pid: this.#loan.connection.pid })
      }
      error = await new Promise<unknown>((resolve) => this.#end(ROLLBACK, [], resolve))
    }
    this.disarm()
    if (this.isTransactional) this.pool.ledger.totals.rollbacks++
    return error
  }

  /**
   * Has what runs finish within `graceMillis`, or cancels it. Resolves when the connection is quiet, and safe from the
   * cancel. A cancel that reaches the backend before the statement does is lost, so a while later there is another.
   */
  async #stop(graceMillis: number): Promise<void> {
    await this.#until(() => this.#phase !== 'departed')
    for (let grace = graceMillis; !this.isQuiet; grace = CANCEL_AGAIN_MILLIS) {
      await this.#within(grace, () => this.isQuiet)
      // After an error the server refuses the rest at once anyway.
      if (!this.isQuiet && !this.#failed) await this.cancel()
    }
    await this.#cancelling
  }

  async #within(millis: number, isReached: () => boolean): Promise<void> {
    let isOver = false
    const timer = setTimeout(() => {
      isOver = true
      this.#changed()
    }, millis)
    await this.#until(() => isReached() || isOver)
    clearTimeout(timer)
  }

  /** Cancels what runs. Only between BEGIN's answer and the sending of COMMIT or ROLLBACK, else it could hit the wrong thing. */
  cancel(): Promise<void> {
    const connection = this.#loan?.connection
    if (connection === undefined || this.#phase !== 'open' || this.#final !== undefined) return Promise.resolve()
    this.#hasCancelled = true
    this.#cancelling ??= new Promise<void>((resolve) => {
      this.pool.ledger.totals.cancels++
      connection.cancel(this.pool.options.settleTimeoutMillis, (certain) => {
        this.#cancelling = undefined
        if (!certain) connection.kill(new Error('It is uncertain whether a statement was cancelled'))
        resolve()
      })
    })
    return this.#cancelling
  }

  /** A cancel under way, which could still hit whatever is sent before this resolves. */
  get cancelling(): Promise<void> | undefined {
    return this.#cancelling
  }

  /** Cancels what runs, or has boarded, as soon as it may. */
  async cancelRunning(): Promise<void> {
    await this.#until(() => this.#phase !== 'boarding' && this.#phase !== 'departed')
    if (this.#underWay > 0) await this.cancel()
  }

  /**
   * Nobody waits any more for what runs before the COMMIT that is not sent yet: it is cancelled, and a connection that says
   * nothing to that is killed.
   */
  hurry(): void {
    if (this.#loan === undefined || this.#final !== undefined) return
    this.arm('a statement that nobody awaits')
    void this.cancelRunning()
  }

  /** Kills the connection unless `disarm` is called within `settleTimeoutMillis`. */
  arm(what: string): void {
    const { settleTimeoutMillis } = this.pool.options
    this.#deadline ??= setTimeout(() => {
      // One turn of the event loop before the verdict: the answer may lie there while the app computed.
      setImmediate(() => {
        if (this.#deadline !== undefined) this.#kill(`No answer to ${what} within ${settleTimeoutMillis} ms`)
      })
    }, settleTimeoutMillis)
  }

  disarm(): void {
    clearTimeout(this.#deadline)
    this.#deadline = undefined
  }

  /**
   * Stops what the raw client runs, and takes the connection along: it cannot be had from who does not give it back.
   * Without the cancel the backend would run on, locks and all, as it does not look whether anybody is still there; and
   * one that reaches it before the statement does is lost.
   */
  async stopLent(why: string): Promise<void> {
    const isBusy = () => this.#isLent && this.#loan?.holding.isBusy === true
    for (let tries = 0; tries < LENT_CANCELS && this.#isLent; tries++) {
      await this.cancel()
      if (!isBusy()) break
      await this.#within(CANCEL_AGAIN_MILLIS, () => !isBusy())
    }
    if (this.#isLent) this.#kill(why)
  }

  #kill(why: string): void {
    this.#loan?.connection.kill(new Error(why))
  }

  /** Gives the connection back, in whatever state; the pool looks at it. The link can be used again. */
  reset(): void {
    this.#stopMaxTimer()
    this.disarm()
    this.#loan?.checkIn()
    this.#loan = undefined
    this.#phase = 'idle'
    this.inTransaction = false
    this.#failed = false
    this.#hasCancelled = false
    this.doom = undefined
    this.#changed()
  }

  // The raw client

  /** Keeps the connection of a link without transactions between statements, until `unpin`. */
  pin(): void {
    this.#pins++
  }

  unpin(): void {
    this.#pins--
    // Whoever needed that very connection knows that it is lost. A transaction has to be ended by somebody.
    if (this.#phase === 'lost' && !this.isTransactional && this.#pins === 0) this.reset()
    this.#resetIfDone()
  }

  /** It has a connection that it keeps from one statement to the next. */
  get isHolding(): boolean {
    return this.#pins > 0 && this.#loan !== undefined
  }

  /** Runs `fn` with the raw client of a quiet connection. */
  async lend<T>(fn: (client: ReturnType<Loan['connection']['lend']>) => Promise<T>): Promise<T> {
    const loan = this.#loan as Loan
    this.#underWay++
    this.#isLent = true
    const { holding } = loan
    try {
      try {
        return await fn(
          loan.connection.lend({
            asked: (text) => holding.busy(1, text),
            answered: () => {
              holding.idle()
              this.#changed()
            },
          }),
        )
      } finally {
        await this.#takeBack(loan)
      }
    } catch (error) {
      throw this.#loan === loan ? error : this.#connectionLost(error as Error, false)
    }
  }

  async #takeBack(loan: Loan): Promise<void> {
    this.#isLent = false
    if (this.#loan !== loan) return
    this.arm('the raw client')
    await new Promise<void>((resolve) => {
      loan.connection.takeBack((status) => {
        this.disarm()
        if (status !== undefined) this.#landed(status, false)
        resolve()
      })
    })
  }

  // Borrower

  granted(loan: Loan): void {
    this.#checkOut = undefined
    this.#loan = loan
    this.#owner.holdings?.push(loan.holding)
    const { beginSql } = this.#owner
    if (!loan.isBehind) this.#startMaxTimer()
    if (beginSql === undefined) {
      this.#phase = 'open'
      this.#sendAll(this.#boarded.splice(0))
      this.#resetIfDone()
      // Who lends the raw client waits for a connection on which nothing is sent.
      this.#changed()
      return
    }
    // The siblings of a Promise.all are a few microtasks away: they board the same flight.
    queueMicrotask(() => {
      if (this.#loan === loan && this.#phase === 'boarding') this.#depart(beginSql, loan)
    })
  }

  #startMaxTimer(): void {
    const { maxSessionMillis } = this.#owner
    if (!maxSessionMillis) return
    const why = `it held its connection for longer than maxSessionMillis (${maxSessionMillis})`
    this.#maxTimer = setTimeout(
      () => this.#owner.onEvict(new SessionEnded(this.pool.options.name, why)),
      maxSessionMillis,
    )
  }

  #stopMaxTimer(): void {
    clearTimeout(this.#maxTimer)
    this.#maxTimer = undefined
  }

  #depart(begin: string, loan: Loan): void {
    const steps = this.#boarded
    this.#boarded = []
    this.#first = steps
    this.#phase = 'departed'
    loan.holding.inTransaction = true
    if (channels.begin.hasSubscribers) {
      const { pool, log, who } = this
      const { pid } = loan.connection
      channels.begin.publish({ pool, log, who, pid, text: begin, isImplicit: steps.length > 0 })
    }
    // Flush: the server tells early that it has begun, even if the first statement takes long.
    const first = new Step({ text: begin, flush: true, prefix: true, fixed: true }, () => {})
    first.onComplete = () => this.#begun()
    const prefix = loan.needsReset ? [new Step(DISCARD, () => {}), first] : [first]
    if (this.#settings !== undefined) prefix.push(this.#settings)
    this.#send([...prefix, ...steps])
  }

  refused(error: unknown): void {
    this.#checkOut = undefined
    this.#phase = 'idle'
    this.#refusal = error
    for (const step of [...this.#boarded.splice(0), ...this.#held.splice(0).flat()]) step.settle(error)
    this.#changed()
  }

  /** An autocommit session has no BEGIN whose answer would tell it apart from the session before. */
  get canFollow(): boolean {
    return this.isTransactional
  }

  caughtUp(): void {
    if (this.#final !== undefined) this.arm(this.#final.spec.text ?? '')
    else if (!this.#hasLeft) this.#startMaxTimer()
  }

  overdue(reason: () => RequestDbError): void {
    // A COMMIT on its way cannot be called back.
    if (this.#phase !== 'departed' || this.#final !== undefined || this.#hasLeft) return
    this.#hasLeft = true
    this.doom = reason()
    for (const step of this.#first) step.settle(this.doom)
    this.#refuseHeld()
    this.#changed()
    this.#owner.onOverdue()
    // What is on its way cannot be called back, only undone.
    void this.rollBack().then(() => this.reset())
  }

  lost(death: Error, again: () => CheckOut): void {
    this.#stopMaxTimer()
    // A connection can die in the very moment in which it is granted, with nothing sent.
    const isFirstTry = this.#replaying || (this.#phase === 'boarding' && this.#replayable)
    if (!isFirstTry) {
      this.#loseAll(death)
      return
    }
    this.#loan = undefined
    this.disarm()
    this.#underWay = 0
    this.#replaying = false
    this.#replayable = false
    this.pool.ledger.totals.replays++
    this.#phase = 'boarding'
    this.#ask(again)
  }

  #loseAll(death: Error): void {
    // Whoever had something under way has been told already.
    const isTold = this.#underWay > 0 || this.#loan?.connection.killed === true
    this.#loan = undefined
    this.disarm()
    this.#underWay = 0
    this.inTransaction = false
    const isNeeded = this.isTransactional || this.#pins > 0
    this.#phase = isNeeded ? 'lost' : 'idle'
    if (isNeeded) this.doom ??= this.#connectionLost(death, isTold)
    this.#refuseHeld()
    this.#changed()
  }

  #connectionLost(death: Error, isTold: boolean): RequestDbError {
    const error = new ConnectionLost(this.pool.options.name, { cause: death })
    this.pool.diagnosis.report(error, !isTold)
    return error
  }

  evict(reason: RequestDbError): void {
    if (!this.#hasLeft) this.#owner.onEvict(reason)
  }

  // Flights

  flightLanded(flight: Flight, status: TransactionStatus): void {
    const { name } = this.pool.options
    if (this.#isObstructed(flight)) {
      this.#departAgain()
      return
    }
    if (this.#isUnclean(flight)) {
      this.#leaveConnection(flight.error)
      return
    }
    if (this.#phase === 'departed') {
      // BEGIN itself was refused: there is no transaction, and nothing may pass as if there were.
      this.#phase = 'open'
      this.doom ??= new TransactionAborted(name, 'BEGIN failed', { cause: flight.error })
      this.#refuseHeld()
    }
    const isEnd = this.#hasFinal(flight)
    this.#landed(this.inTransaction && flight.steps.some(endsTransaction) ? 'I' : status, isEnd)
    if (isEnd && this.#loan?.isOver) this.#part(this.#loan, status)
    tellLanded(flight, name)
    this.#changed()
  }

  flightLost(flight: Flight, death: Error, reached: boolean): void {
    const killedByUs = this.#loan?.connection.killed === true
    const isTooLate = killedByUs || hasWaitedInPooler(death)
    if (this.#phase === 'departed' && this.#replayable && !this.#hasLeft && !isTooLate && !this.#hasFinal(flight)) {
      this.#replaying = true
      this.#boarded = this.#first
      return
    }
    // What leaves a transaction open is undone with it; only what ends one, or needs none, can have been kept.
    const isDecisive = (step: Step) => !this.isTransactional || (step === this.#final && step.spec.text === 'COMMIT')
    tellLost(flight, death, reached, () => this.#connectionLost(death, killedByUs), this.pool.options.name, isDecisive)
    // The pool tells only whom the connection has been handed over to.
    if (this.#loan?.isOver) this.#loseAll(death)
  }

  // Inside

  // The session before handed over a transaction that had failed, as only its own COMMIT could tell. Nothing was done.
  #isObstructed({ at, error }: Flight): boolean {
    const isFirst = this.#phase === 'departed' && this.#loan?.isBehind === true && !this.#hasLeft
    return isFirst && at === 0 && sqlStateOf(error) === IN_FAILED_TRANSACTION
  }

  // What others have left on the connection could not be discarded, and nothing was done.
  #isUnclean({ at, error, steps }: Flight): boolean {
    const isFirst = this.#phase === 'departed' && this.#replayable && !this.#hasLeft
    return isFirst && at === 0 && error !== undefined && steps[0]?.spec.resets === true
  }

  #leaveConnection(cause: unknown): void {
    this.#underWay--
    this.#boarded = this.#first
    this.#phase = 'boarding'
    this.#loan?.connection.kill(new Error('DISCARD ALL was refused', { cause }))
  }

  // Behind the ROLLBACK that the session before has sent by now.
  #departAgain(): void {
    const loan = this.#loan as Loan
    this.#underWay--
    loan.caughtUp()
    loan.holding.again(this.#first.filter((step) => step.spec.describe).length)
    this.#boarded = this.#first
    this.#depart(this.#owner.beginSql as string, loan)
  }

  // The connection has been handed over; nobody else would end what is left open on it.
  #part(loan: Loan, status: TransactionStatus): void {
    if (status === 'I') loan.answered()
    else {
      const rollback = new Step(ROLLBACK, () => {})
      loan.connection.sendWithin(this.pool.options.settleTimeoutMillis, 'ROLLBACK', [rollback], () => {})
    }
    const { spec, tag } = this.#final as Step
    if (spec.text === 'COMMIT' && tag !== 'COMMIT') this.pool.ledger.totals.rollbacks++
    this.#loan = undefined
    this.#phase = 'idle'
    this.inTransaction = false
    this.#failed = false
  }

  #hasFinal(flight: Flight): boolean {
    return this.#final !== undefined && flight.steps.includes(this.#final)
  }

  #board(steps: Step[]): void {
    this.#phase = 'boarding'
    this.#boarded.push(...steps)
    this.#replayable = this.isTransactional
    this.#hasLeft = false
    this.#refusal = undefined
    try {
      this.#settings = this.#owner.settings()
    } catch (error) {
      // The app's own function has thrown. Deferred writes that were to leave now must hear of it too.
      this.refused(error)
      return
    }
    this.#ask(() => this.pool.checkOut(this))
  }

  #ask(how: () => CheckOut): void {
    const checkOut = how()
    if (this.#phase === 'boarding') this.#checkOut = checkOut
  }

  #sendAll(steps: Step[]): void {
    if (this.isTransactional) this.#send(steps)
    else for (const step of steps) this.#send(this.#settings === undefined ? [step] : [this.#settings, step])
  }

  #send(steps: Step[]): void {
    const loan = this.#loan as Loan
    const { connection, holding } = loan
    const isEnd = this.#final !== undefined && steps.includes(this.#final)
    if (isEnd) {
      this.#stopMaxTimer()
      this.#finalPid = connection.pid
      // The session before has a deadline of its own.
      if (!loan.isBehind) this.arm(this.#final?.spec.text ?? '')
    }
    this.#underWay++
    const asked = steps.filter((step) => step.spec.describe)
    holding.busy(asked.length, asked[asked.length - 1]?.spec.text ?? '')
    for (const step of steps) step.event?.leaves(connection.pid)
    connection.send(steps, this)
    // Who has cancelled keeps the connection until it is certain that the cancel hits nobody else.
    if (isEnd && !this.#hasCancelled) loan.offer()
  }

  #begun(): void {
    this.inTransaction = true
    this.#phase = 'open'
    for (const steps of this.#held.splice(0)) this.#send(steps)
    this.#changed()
  }

  /** The server has answered a flight, or the borrower of the raw client is done. */
  #landed(status: TransactionStatus, isEnd: boolean): void {
    this.#underWay--
    this.#failed = status === 'E'
    if (this.#underWay === 0) this.#loan?.holding.idle()
    if (this.inTransaction && status === 'I' && !isEnd) {
      const why =
        'a statement of the app ended the transaction: use request.db.commit() or request.db.rollback() instead'
      this.doom ??= new TransactionAborted(this.pool.options.name, why)
    }
    this.#resetIfDone()
  }

  // Without a transaction the connection is needed only while a statement runs.
  #resetIfDone(): void {
    const isDone = this.#underWay === 0 && this.#pins === 0 && this.#phase === 'open'
    if (this.isTransactional || !isDone) return
    if (this.#cancelling === undefined) this.reset()
    else void this.#cancelling.then(() => this.#resetIfDone())
  }

  #refuseHeld(): void {
    for (const step of [...this.#boarded.splice(0), ...this.#held.splice(0).flat()]) step.settle(this.doom)
  }

  #endedError(): RequestDbError {
    return new SessionEnded(this.pool.options.name, 'its COMMIT or ROLLBACK is under way')
  }

  #changed(): void {
    for (const resolve of this.#onChange.splice(0)) resolve()
  }

  async #until(isReached: () => boolean): Promise<void> {
    while (!isReached()) await new Promise<void>((resolve) => this.#onChange.push(resolve))
  }
}
