import type { FastifyBaseLogger } from 'fastify'
import type pg from 'pg'
import {
  CommitUnknown,
  ConnectionLost,
  NestedConflict,
  type RequestDbError,
  SessionEnded,
  SettleFailed,
  sqlStateOf,
  TransactionAborted,
} from '../errors.ts'
import type { Flight, FlightListener, Result, TransactionStatus } from '../pool/flight.ts'
import { Step } from '../pool/flight.ts'
import type { Who } from '../pool/ledger.ts'
import type { Borrower, CheckOut, Loan, Pool } from '../pool/pool.ts'
import { type Callback, enter, nest, type Scope, Scopes } from './scope.ts'

/** How a unit of work begins, and whom it tells. */
export interface UnitOptions {
  readonly who: Who
  /** The BEGIN statement; undefined sends every statement on its own. */
  readonly begin: string | undefined
  /** Statement and values that set the transaction's run-time parameters, asked once per transaction. */
  readonly settings: () => Step | undefined
  readonly maxSessionMillis: number | false
  readonly log: FastifyBaseLogger
  /** Before the first statement. @throws SESSION_ENDED when it is too late for one. */
  readonly onFirstUse: () => void
  /** The session was ended from outside while its answer may be on the way. */
  readonly onCut: () => void
}

/** What a session can be in. `failed`: the server, or the loss of the connection, leaves only a rollback. */
export type SessionState = 'idle' | 'begun' | 'failed' | 'ended'

// How long what runs may finish by itself before it is cancelled: a cancel costs a connection of its own.
const CANCEL_AFTER_MILLIS = 50

const UNAWAITED = 'A nested transaction was still open when the session ended, and was not kept: await it'

/**
 * One unit of work: at most one connection, at most one transaction at a time.
 *
 * | phase    | connection     | what is sent now                                             |
 * | -------- | -------------- | ------------------------------------------------------------ |
 * | idle     | none           | asks for a connection, boards the first flight               |
 * | boarding | asked for      | boards the first flight                                      |
 * | departed | ours           | is held until BEGIN is answered, else it might commit alone  |
 * | open     | ours           | leaves at once                                               |
 * | lost     | died           | is refused with CONNECTION_LOST until rolled back            |
 */
export class UnitOfWork implements Borrower, FlightListener {
  readonly pool: Pool
  readonly options: UnitOptions
  /** The session's unit: this one, or the one it is a child of. */
  readonly owner: UnitOfWork
  readonly #scopes: Scopes
  /** Units that live and end with this one: transactions and streams of an autocommit session. */
  readonly #children = new Set<UnitOfWork>()
  #phase: 'idle' | 'boarding' | 'departed' | 'open' | 'lost' = 'idle'
  #used = false
  #checkOut: CheckOut | undefined
  #loan: Loan | undefined
  #settings: Step | undefined
  #boarded: Step[] = []
  #held: Step[][] = []
  #replayable = true
  #replaying = false
  #underWay = 0
  #inTransaction = false
  #failed = false
  // Why the transaction cannot be committed, where the server does not know it: lost, or ended behind our back.
  #doom: RequestDbError | undefined
  #deferredFailure: { what: string; error: Error } | undefined
  #deferred = 0
  #refusal: RequestDbError | undefined
  // How many need the connection of an autocommit session between statements too.
  #pins = 0
  #final: Step | undefined
  #deadline: NodeJS.Timeout | undefined
  #maxTimer: NodeJS.Timeout | undefined
  #ended: RequestDbError | undefined
  #outcome: 'commit' | 'rollback' | undefined
  #settlement: Promise<void> | undefined
  #ending: Promise<void> | undefined
  #onChange: (() => void)[] = []

  constructor(pool: Pool, options: UnitOptions, owner?: UnitOfWork) {
    this.pool = pool
    this.options = options
    this.owner = owner ?? this
    this.#scopes = new Scopes(this, pool.options.timeoutMillis || 10_000)
  }

  get who(): Who {
    return this.options.who
  }

  get root(): Scope {
    return this.#scopes.root
  }

  get inTransaction(): boolean {
    return this.#inTransaction
  }

  get state(): SessionState {
    if (this.#ended !== undefined) return 'ended'
    if (this.#failed || this.#doom !== undefined) return 'failed'
    return this.#phase === 'idle' ? 'idle' : 'begun'
  }

  get ended(): boolean {
    return this.#ended !== undefined
  }

  // Statements

  /** Sends one statement of `scope` when it is its turn. */
  async run(scope: Scope, text: string, values: unknown[]): Promise<Result> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    const { result } = await this.#statement(scope, { text, values, describe: true })
    return result as Result
  }

  /** Opens a portal on a statement and reads its rows in chunks. Other statements of the session may go in between. */
  async *read(scope: Scope, text: string, values: unknown[], portal: string, rows: number): AsyncGenerator<unknown[]> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    let step = await this.#statement(scope, { text, values, describe: true, portal, rows })
    const result = step.result as Result
    try {
      while (step.suspended) {
        yield result.rows.splice(0)
        for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
        step = await this.#statement(scope, { portal, rows }, result)
      }
      if (result.rows.length > 0) yield result.rows.splice(0)
    } finally {
      // A consumer that stops early leaves the portal open. The end of the transaction closes it too.
      if (step.suspended && this.#phase === 'open' && this.#ended === undefined && !this.#failed) {
        this.#post([new Step({ portal, closes: true }, () => {})])
      }
    }
  }

  /** Keeps a write until the next statement of `scope`, `flush` or the end. */
  keep(scope: Scope, text: string, values: unknown[]): void {
    this.#assertUsable()
    if (!scope.open) this.#scopes.turn(scope)
    const what = `Deferred write ${++this.#deferred}`
    const onSettle = (error: unknown) => {
      if (error !== undefined) this.#deferredFailure ??= { what, error: error as Error }
    }
    scope.kept.push(new Step({ text, values, describe: true }, onSettle))
  }

  /** Sends what `keep` has kept. @throws what the first of them failed with, as pg made it. */
  async flush(scope: Scope): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    if (scope.kept.length === 0) return
    const last = scope.kept.pop() as Step
    this.#deferredFailure = undefined
    await this.#settled((settle) => [...take(scope), rewire(last, settle)]).catch((error) => {
      throw this.#deferredFailure?.error ?? error
    })
  }

  /** Begins the transaction without a statement. @throws NESTED_CONFLICT when one is open, or the session is autocommit. */
  async begin(scope: Scope): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    if (this.options.begin === undefined) {
      throw new NestedConflict('An autocommit session has no begin(): use transaction().execute(fn)')
    }
    if (this.#phase !== 'idle') {
      throw new NestedConflict('A transaction is open on this session: use transaction().execute(fn) for a savepoint')
    }
    await this.#take([])
  }

  // Savepoints

  /** Begins a savepoint in `parent`. */
  async savepoint(parent: Scope, followed: boolean): Promise<Scope> {
    for (let turn = this.#turn(parent); turn; turn = this.#turn(parent)) await turn
    const scope = this.#scopes.push('savepoint', followed)
    enter(this.owner, scope)
    try {
      await this.#command(parent, `SAVEPOINT ${scope.name}`)
    } catch (error) {
      this.#scopes.pop(scope)
      throw error
    }
    return scope
  }

  async release(scope: Scope): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    await this.#command(scope, `RELEASE SAVEPOINT ${scope.name}`)
    this.#scopes.pop(scope)
    const parent = this.#scopes.top
    parent.afterCommit.push(...scope.afterCommit)
    parent.afterRollback.push(...scope.afterRollback)
  }

  /** Never throws: the error that led here is the one to report. */
  async rollbackTo(scope: Scope): Promise<void> {
    scope.kept = []
    this.#deferredFailure = undefined
    const isOpen = scope.open && this.#loan !== undefined && this.#ended === undefined
    if (!isOpen) {
      this.#scopes.pop(scope)
      return
    }
    try {
      await this.#settled((settle) => [
        new Step({ text: `ROLLBACK TO SAVEPOINT ${scope.name}` }, () => {}),
        new Step({ text: `RELEASE SAVEPOINT ${scope.name}` }, settle),
      ])
    } catch (error) {
      this.options.log.error({ err: error }, 'request-db: rolling back to a savepoint failed')
    } finally {
      this.#scopes.pop(scope)
    }
  }

  // The raw client

  /** Lends the raw client to `fn`; the session's own statements wait meanwhile. */
  async withClient<T>(parent: Scope, fn: (client: pg.Client) => Promise<T>): Promise<T> {
    for (let turn = this.#turn(parent); turn; turn = this.#turn(parent)) await turn
    const scope = this.#scopes.push('client', true)
    this.#pins++
    try {
      const loan = await this.#take(take(parent))
      const client = loan.connection.lend()
      this.#underWay++
      loan.holding.busy(1, '(raw client)')
      try {
        return await nest(this.owner, () => {
          enter(this.owner, scope)
          return fn(client)
        })
      } finally {
        await this.#takeBack(loan)
      }
    } finally {
      this.#pins--
      this.#scopes.pop(scope)
      this.#releaseIfDone()
    }
  }

  /** Has a connection with a transaction on it and nothing under way. */
  async #take(steps: Step[]): Promise<Loan> {
    this.#post(steps)
    await this.#quiet()
    const error = this.#doom ?? this.#refusal
    if (error !== undefined) throw error
    return this.#loan as Loan
  }

  async #takeBack(loan: Loan): Promise<void> {
    if (this.#loan !== loan) return
    this.#armDeadline('the raw client')
    await new Promise<void>((resolve) => {
      loan.connection.takeBack((status) => {
        this.#disarmDeadline()
        if (status !== undefined) this.#landed(status, false)
        resolve()
      })
    })
  }

  // The end

  /** Commits; the unit can be used again. */
  commit(scope: Scope): Promise<void> {
    return this.#endTransaction(scope, () => this.#commit())
  }

  /** Rolls back; the unit can be used again. */
  rollback(scope: Scope): Promise<void> {
    return this.#endTransaction(scope, () => this.#rollback())
  }

  /**
   * Ends the unit for good. Undefined when there was nothing to end. However often it is called, there is one settlement;
   * a commit asked for after a rollback is refused.
   */
  settle(outcome: 'commit' | 'rollback', why: string | RequestDbError): Promise<void> | undefined {
    if (this.#ended !== undefined) {
      return outcome === 'commit' && this.#outcome === 'rollback' ? Promise.reject(this.#ended) : this.#settlement
    }
    this.#ended = typeof why === 'string' ? new SessionEnded(this.pool.options.name, why) : why
    this.#outcome = outcome
    this.#scopes.refuseAll(this.#ended)
    const isUnused = this.#phase === 'idle' && this.root.kept.length === 0 && this.#ending === undefined
    if (isUnused && this.#children.size === 0 && this.root.afterCommit.length + this.root.afterRollback.length === 0) {
      return undefined
    }
    this.#settlement = this.#settle(outcome)
    return this.#settlement
  }

  /** Ends it because nobody is left to answer. Once COMMIT is sent, that stands. Never throws. */
  async abandon(why: string | RequestDbError): Promise<void> {
    const isMine = this.#ended === undefined
    const settlement = this.settle('rollback', why)
    const isWaitingToCommit = this.#phase === 'boarding' && this.#final !== undefined
    if (isWaitingToCommit) this.#leaveQueue()
    try {
      await settlement
    } catch (error) {
      // Who began the settlement reports its failure.
      if (isMine) this.options.log.error({ err: error }, 'request-db: ending a session failed')
    }
  }

  /** A transaction of its own, on a connection of its own, inside an autocommit session. It ends with the session. */
  openChild(begin: string): UnitOfWork {
    this.#assertUsable()
    const child = new UnitOfWork(this.pool, { ...this.options, begin }, this.owner)
    this.#children.add(child)
    return child
  }

  /** Makes this child the scope of the transaction callback that runs. */
  enter(): Scope {
    enter(this.owner, this.root)
    return this.root
  }

  async closeChild(child: UnitOfWork, outcome: 'commit' | 'rollback'): Promise<void> {
    try {
      await child.settle(outcome, 'its transaction has ended')
    } finally {
      this.#children.delete(child)
    }
  }

  /** Has the server stop what runs now; its statement fails with 57014. */
  async cancelRunning(): Promise<void> {
    await this.#cancel()
  }

  // Borrower

  granted(loan: Loan): void {
    this.#checkOut = undefined
    this.#loan = loan
    const { begin, maxSessionMillis } = this.options
    if (maxSessionMillis) {
      this.#maxTimer = setTimeout(() => {
        void this.abandon(`it held its connection for longer than maxSessionMillis (${maxSessionMillis})`)
        this.options.onCut()
      }, maxSessionMillis)
    }
    const steps = this.#boarded.splice(0)
    if (begin === undefined) {
      this.#phase = 'open'
      for (const step of steps) this.#send([step])
      this.#releaseIfDone()
      return
    }
    this.#phase = 'departed'
    loan.holding.inTransaction = true
    // Flush: the server tells early that it has begun, even if the first statement takes long.
    const first = new Step({ text: begin, flush: true, prefix: true }, () => {})
    first.onComplete = () => this.#begun()
    this.#send(this.#settings === undefined ? [first, ...steps] : [first, this.#settings, ...steps])
  }

  refused(error: RequestDbError): void {
    this.#checkOut = undefined
    this.#phase = 'idle'
    this.#refusal = error
    for (const step of [...this.#boarded.splice(0), ...this.#held.splice(0).flat()]) step.onSettle(error, step)
    this.#changed()
  }

  lost(death: Error): void {
    this.#loan = undefined
    clearTimeout(this.#maxTimer)
    this.#disarmDeadline()
    this.#underWay = 0
    if (this.#replaying) {
      this.#replaying = false
      this.#replayable = false
      this.pool.ledger.totals.replays++
      this.#phase = 'boarding'
      this.#ask()
      return
    }
    const wasTransaction = this.options.begin !== undefined
    this.#inTransaction = false
    this.#phase = wasTransaction ? 'lost' : 'idle'
    if (wasTransaction) this.#doom ??= new ConnectionLost(this.pool.options.name, { cause: death })
    this.#refuseHeld()
    this.#changed()
  }

  evict(reason: RequestDbError): void {
    void this.abandon(reason)
  }

  // Flights

  flightLanded(flight: Flight, status: TransactionStatus): void {
    const { error } = flight
    if (this.#phase === 'departed') {
      // BEGIN itself was refused: there is no transaction, and nothing may pass as if there were.
      this.#phase = 'open'
      this.#doom = new TransactionAborted(this.pool.options.name, 'BEGIN failed', { cause: error })
      this.#refuseHeld()
    }
    this.#landed(status, this.#final !== undefined && flight.steps.includes(this.#final))
    const at = error === undefined ? flight.steps.length : Math.min(flight.at, flight.steps.length - 1)
    // Where the prefix failed, the statements behind it deserve its error, not the news that they were skipped.
    const skipped = error && (flight.steps[at]?.spec.prefix ? error : this.#skippedError(error))
    for (const [index, step] of flight.steps.entries()) {
      step.onSettle(index < at ? step.rowError : index === at ? error : skipped, step)
    }
    this.#changed()
  }

  flightLost(flight: Flight, death: Error, reached: boolean): void {
    const { name } = this.pool.options
    const finalAt = this.#final === undefined ? -1 : flight.steps.indexOf(this.#final)
    const killedByUs = this.#loan?.connection.killed === true
    if (this.#phase === 'departed' && this.#replayable && !killedByUs && finalAt === -1 && this.#ended === undefined) {
      this.#replaying = true
      this.#boarded = flight.steps.filter((step) => step.spec.prefix !== true)
      return
    }
    const lost = new ConnectionLost(name, { cause: death })
    for (const [index, step] of flight.steps.entries()) {
      if (index !== finalAt) step.onSettle(lost, step)
      else if (step.completed) step.onSettle(undefined, step)
      else {
        // The server answers in order: a goodbye before COMMIT's turn means that COMMIT was never run.
        const never = !reached || (sqlStateOf(death) !== undefined && flight.at < finalAt)
        step.onSettle(never ? lost : new CommitUnknown(name, { cause: death }), step)
      }
    }
  }

  // Inside

  #assertUsable(): void {
    if (this.#ended !== undefined) throw this.#endedError()
    if (this.#used) return
    this.options.onFirstUse()
    this.#used = true
  }

  #endedError(): RequestDbError {
    return this.#ended ?? new SessionEnded(this.pool.options.name, 'it was rolled back')
  }

  #skippedError(cause: Error): RequestDbError {
    return new TransactionAborted(this.pool.options.name, 'a statement sent together with this one failed', { cause })
  }

  /**
   * Undefined when `scope` may act this very moment. Otherwise await it and ask again, since a sibling may have been
   * faster, and then act without another await in between.
   */
  #turn(scope: Scope): Promise<void> | undefined {
    this.#assertUsable()
    return this.#scopes.turn(scope)
  }

  /** Sends a statement of the app, and what was kept before it, and waits for its answer. */
  #statement(scope: Scope, spec: Step['spec'], result?: Result): Promise<Step> {
    return new Promise((resolve, reject) => {
      const step = new Step(spec, (error) => (error === undefined ? resolve(step) : reject(error)))
      step.result = result
      this.#post([...take(scope), step])
    })
  }

  /** Sends a command of ours in `scope`. */
  #command(scope: Scope, text: string): Promise<void> {
    return this.#settled((settle) => [...take(scope), new Step({ text }, settle)])
  }

  #settled(steps: (settle: Step['onSettle']) => Step[]): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#post(steps((error) => (error === undefined ? resolve() : reject(error))))
    })
  }

  #post(steps: Step[]): void {
    if (this.#doom !== undefined) {
      for (const step of steps) step.onSettle(this.#doom, step)
    } else if (this.#phase === 'idle') {
      this.#settings = this.options.settings()
      this.#refusal = undefined
      this.#phase = 'boarding'
      this.#replayable = this.options.begin !== undefined
      this.#boarded.push(...steps)
      this.#ask()
    } else if (this.#phase === 'boarding') this.#boarded.push(...steps)
    else if (this.#phase === 'departed') this.#held.push(steps)
    else if (this.options.begin === undefined) for (const step of steps) this.#send([step])
    else this.#send(steps)
  }

  #ask(): void {
    const checkOut = this.pool.checkOut(this)
    if (this.#phase === 'boarding') this.#checkOut = checkOut
  }

  #send(steps: Step[]): void {
    const { connection, holding } = this.#loan as Loan
    const isAlone = this.options.begin === undefined && this.#settings !== undefined
    const flight = isAlone ? [this.#settings as Step, ...steps] : steps
    if (this.#final !== undefined && steps.includes(this.#final)) this.#armDeadline(this.#final.spec.text ?? '')
    this.#underWay++
    const asked = steps.filter((step) => step.spec.describe)
    holding.busy(asked.length, asked[asked.length - 1]?.spec.text ?? '')
    connection.send(flight, this)
  }

  #begun(): void {
    this.#inTransaction = true
    this.#phase = 'open'
    for (const steps of this.#held.splice(0)) this.#send(steps)
    this.#changed()
  }

  /** The server has answered a flight, or the borrower of the raw client is done. */
  #landed(status: TransactionStatus, isEnd: boolean): void {
    this.#underWay--
    this.#failed = status === 'E'
    if (this.#underWay === 0) this.#loan?.holding.idle()
    if (this.#inTransaction && status === 'I' && !isEnd) {
      this.#doom ??= new TransactionAborted(
        this.pool.options.name,
        'a statement of the handler ended the transaction itself: use request.db.commit() or request.db.rollback()',
      )
    }
    this.#releaseIfDone()
  }

  // Without a transaction the connection is only needed while a statement runs.
  #releaseIfDone(): void {
    const isDone = this.#underWay === 0 && this.#pins === 0 && this.#phase === 'open'
    if (this.options.begin !== undefined || !isDone) return
    if (this.#cancelling === undefined) this.#checkIn()
    else void this.#cancelling.then(() => this.#releaseIfDone())
  }

  #refuseHeld(): void {
    const error = this.#doom ?? this.#endedError()
    for (const steps of this.#held.splice(0)) for (const step of steps) step.onSettle(error, step)
  }

  #leaveQueue(): void {
    if (this.#checkOut !== undefined) this.pool.cancel(this.#checkOut)
    this.refused(this.#endedError())
  }

  #changed(): void {
    for (const resolve of this.#onChange.splice(0)) resolve()
  }

  async #until(isReached: () => boolean): Promise<void> {
    while (!isReached()) await new Promise<void>((resolve) => this.#onChange.push(resolve))
  }

  #quiet(): Promise<void> {
    return this.#until(() => this.#underWay === 0 && this.#phase !== 'boarding' && this.#phase !== 'departed')
  }

  // Ending a transaction

  async #endTransaction(scope: Scope, how: () => Promise<void>): Promise<void> {
    if (scope !== this.root) {
      throw new NestedConflict('commit() and rollback() end the whole session: not inside a nested transaction')
    }
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    this.#scopes.lock()
    this.#ending = how().finally(() => {
      this.#ending = undefined
      this.#scopes.unlock()
    })
    await this.#ending
  }

  async #settle(outcome: 'commit' | 'rollback'): Promise<void> {
    // A commit() or rollback() by hand is under way, awaited or not: it comes first.
    await this.#ending?.catch(() => {})
    this.#scopes.lock()
    const open = this.#scopes.top
    if (outcome === 'commit' && open !== this.root) {
      // Half of a nested transaction must not be kept, and its raw client cannot be taken away.
      if (open.kind === 'client') this.#loan?.connection.kill(new Error('withClient(fn) was not awaited'))
      await this.#rollback()
      throw new NestedConflict(UNAWAITED)
    }
    const children = [...this.#children]
    await Promise.all(children.map((child) => child.abandon('its session has ended')))
    if (outcome === 'commit' && children.length > 0) throw new NestedConflict(UNAWAITED)
    await (outcome === 'commit' ? this.#commit() : this.#rollback())
  }

  async #commit(): Promise<void> {
    const kept = take(this.root)
    if (this.options.begin === undefined) return this.#finishAutocommit(kept)
    await this.#cancelling
    const isNothing = this.#phase === 'idle' && kept.length === 0 && this.#deferredFailure === undefined
    if (!isNothing) {
      const error = this.#doom ?? (await this.#sendCommit(kept))
      if (error !== undefined) {
        this.pool.ledger.totals.failedCommits++
        await this.#rollback()
        throw error
      }
      this.pool.ledger.totals.commits++
      this.#checkIn()
    }
    this.#callBack(this.root.afterCommit)
  }

  async #finishAutocommit(kept: Step[]): Promise<void> {
    if (kept.length > 0) this.#post(kept)
    await this.#until(() => this.#phase === 'idle')
    const failure = this.#takeFailure()
    if (failure !== undefined) throw failure
    this.#callBack(this.root.afterCommit)
  }

  /** Sends COMMIT with what was kept before it, in one flight. Resolves with what went wrong. */
  async #sendCommit(kept: Step[]): Promise<Error | undefined> {
    const { name } = this.pool.options
    if (this.#phase === 'idle' && kept.length === 0) return this.#takeFailure()
    let final: Step | undefined
    const error = await new Promise<unknown>((resolve) => {
      final = new Step({ text: 'COMMIT' }, resolve)
      this.#final = final
      try {
        this.#post([...kept, final])
      } catch (failed) {
        resolve(failed)
      }
    })
    this.#disarmDeadline()
    this.#final = undefined
    if (error === undefined && final?.result?.command === 'COMMIT') return undefined
    const failure = this.#takeFailure()
    if (failure !== undefined) return failure
    if (error === undefined)
      return new TransactionAborted(name, 'a statement failed and the handler went on without it')
    return sqlStateOf(error) === undefined ? (error as Error) : new SettleFailed('COMMIT', name, error as Error)
  }

  /** The first deferred write that failed, as an error of ours where it was PostgreSQL that refused it. */
  #takeFailure(): Error | undefined {
    const failure = this.#deferredFailure
    this.#deferredFailure = undefined
    if (failure === undefined || sqlStateOf(failure.error) === undefined) return failure?.error
    return new SettleFailed(failure.what, this.pool.options.name, failure.error)
  }

  /** Leaves nothing behind on the server or in the queue. Never throws: a connection that does not obey is killed. */
  async #rollback(): Promise<void> {
    this.#scopes.reset()
    this.#deferredFailure = undefined
    this.#deferred = 0
    if (this.#phase === 'boarding') this.#leaveQueue()
    if (this.#loan !== undefined) {
      this.#armDeadline('ROLLBACK')
      await this.#until(() => this.#phase !== 'departed')
      await this.#stopRunning()
      const { connection } = this.#loan ?? {}
      if (connection !== undefined && connection.status !== 'I') await this.#sendRollback()
      this.#disarmDeadline()
      if (this.options.begin !== undefined) this.pool.ledger.totals.rollbacks++
    }
    this.#checkIn()
    this.#callBack(this.root.afterRollback)
  }

  async #sendRollback(): Promise<void> {
    try {
      await this.#settled((settle) => {
        this.#final = new Step({ text: 'ROLLBACK' }, settle)
        return [this.#final]
      })
    } catch (error) {
      this.options.log.warn({ err: error }, 'request-db: ROLLBACK failed, the connection is dropped')
    } finally {
      this.#final = undefined
    }
  }

  // What runs gets a moment to finish, then it is cancelled. After an error the server refuses the rest at once anyway.
  async #stopRunning(): Promise<void> {
    if (this.#underWay === 0) return
    const timer = setTimeout(() => {
      if (this.#underWay > 0 && !this.#failed) void this.#cancel()
    }, CANCEL_AFTER_MILLIS)
    await this.#quiet()
    clearTimeout(timer)
    await this.#cancelling
  }

  #cancelling: Promise<void> | undefined

  /** Only between BEGIN's answer and the sending of COMMIT or ROLLBACK, else the signal could hit the wrong thing. */
  #cancel(): Promise<void> {
    const connection = this.#loan?.connection
    if (connection === undefined || this.#phase !== 'open' || this.#final !== undefined) return Promise.resolve()
    this.pool.ledger.totals.cancels++
    this.#cancelling ??= new Promise<void>((resolve) => {
      connection.cancel(this.pool.options.settleTimeoutMillis, (certain) => {
        this.#cancelling = undefined
        if (!certain) connection.kill(new Error('A statement could not be cancelled'))
        resolve()
      })
    })
    return this.#cancelling
  }

  #armDeadline(what: string): void {
    const { settleTimeoutMillis } = this.pool.options
    this.#deadline ??= setTimeout(() => {
      setImmediate(() => {
        if (this.#deadline === undefined) return
        this.#loan?.connection.kill(new Error(`No answer to ${what} within ${settleTimeoutMillis} ms`))
      })
    }, settleTimeoutMillis)
  }

  #disarmDeadline(): void {
    clearTimeout(this.#deadline)
    this.#deadline = undefined
  }

  #checkIn(): void {
    clearTimeout(this.#maxTimer)
    this.#loan?.checkIn()
    this.#loan = undefined
    this.#phase = 'idle'
    this.#inTransaction = false
    this.#failed = false
    this.#doom = undefined
    this.#changed()
  }

  #callBack(callbacks: Callback[]): void {
    this.root.afterCommit = []
    this.root.afterRollback = []
    for (const callback of callbacks) {
      try {
        Promise.resolve(callback()).catch((error: unknown) => this.#logCallback(error))
      } catch (error) {
        this.#logCallback(error)
      }
    }
  }

  #logCallback(error: unknown): void {
    this.options.log.error({ err: error }, 'request-db: a callback of afterCommit or afterRollback failed')
  }
}

/** Takes what a scope has kept. */
function take(scope: Scope): Step[] {
  if (scope.kept.length === 0) return []
  const kept = scope.kept
  scope.kept = []
  return kept
}

function rewire(step: Step, settle: Step['onSettle']): Step {
  const both = new Step(step.spec, (error) => {
    step.onSettle(error, step)
    settle(error, both)
  })
  return both
}
