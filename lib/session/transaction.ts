import { AsyncResource } from 'node:async_hooks'
import type { FastifyBaseLogger } from 'fastify'
import type pg from 'pg'
import { isFollowing } from '../context.ts'
import {
  CommitUnknown,
  NestedConflict,
  type RequestDbError,
  SessionEnded,
  SettleFailed,
  sqlStateOf,
  TransactionAborted,
} from '../errors.ts'
import type { Origin } from '../observe/origin.ts'
import type { Who } from '../observe/snapshot.ts'
import { ObservedStatement } from '../observe/statement.ts'
import { type Result, Step } from '../pool/flight.ts'
import type { Holding } from '../pool/ledger.ts'
import type { Pool } from '../pool/pool.ts'
import { DeferredWrites } from './deferred.ts'
import { Link, type LinkOwner } from './link.ts'
import { Memory } from './memory.ts'
import { hasWritten } from './reads.ts'
import { type Callback, enter, nest, outside, type Scope, Scopes } from './scope.ts'

/** Whose unit of work it is: what it needs to know, and who is told. */
export interface UnitHost extends Omit<LinkOwner, 'beginSql' | 'onEvict' | 'onOverdue'> {
  /** Its COMMIT can bring no news: it wrote nothing, and no other transaction can make it fail. */
  readonly isCommitCertain: boolean
  /** Before the first statement. @throws SESSION_ENDED when it is too late for one. */
  onFirstUse(): void
  /** The session was ended from outside while its answer may be on the way. */
  onCut(): void
}

/** What a session can be in. `failed`: the server, or the loss of the connection, leaves only a rollback. */
export type SessionState = 'idle' | 'begun' | 'failed' | 'ended'

const UNAWAITED = 'A nested transaction was still open when the session ended, and was not kept: await it'

/**
 * One unit of work: what a session can be asked to do, in which order, and how it ends. Every method that sends
 * something waits for its scope's turn first; `commit` and `rollback` leave it usable, `settle` and `abandon` end it.
 */
export class UnitOfWork implements LinkOwner {
  readonly host: UnitHost
  readonly beginSql: string | undefined
  /** The session's unit: this one, or the one it is a child of. */
  readonly owner: UnitOfWork
  #link: Link
  readonly #scopes: Scopes<UnitOfWork>
  readonly #deferred: DeferredWrites
  /** Units that live and end with this one: transactions and streams of an autocommit session. */
  #children: Set<UnitOfWork> | undefined
  #used = false
  /** Something of it is kept, whatever comes. */
  hasCommitted = false
  /** Something other than a read was sent, or is to be. */
  hasWritten = false
  /** What it has read with `remember`. */
  memory: Memory | undefined
  // Why it is over. An error is made of it for whoever still uses it, with the stack of that use.
  #ended: string | RequestDbError | undefined
  #outcome: 'commit' | 'rollback' | undefined
  #settlement: Promise<void> | undefined
  #abandoned = false
  #ending: Promise<void> | undefined

  /** `begin` is the BEGIN statement; undefined is autocommit. */
  constructor(pool: Pool, host: UnitHost, begin: string | undefined, owner?: UnitOfWork) {
    this.host = host
    this.beginSql = begin
    this.owner = owner ?? this
    this.#link = new Link(pool, this)
    this.#scopes = new Scopes(this, pool.options.timeoutMillis || 10_000)
    this.#deferred = new DeferredWrites(pool.options.name, begin === undefined ? 'it was not kept' : 'nothing was kept')
  }

  // For the link

  get who(): Who {
    return this.host.who
  }

  get log(): FastifyBaseLogger {
    return this.host.log
  }

  get origin(): Origin | undefined {
    return this.host.origin
  }

  get holdings(): Holding[] | undefined {
    return this.host.holdings
  }

  get maxSessionMillis(): number | false {
    return this.host.maxSessionMillis
  }

  settings(): Step | undefined {
    return this.host.settings()
  }

  onEvict(reason: RequestDbError): void {
    void this.abandon(reason)
    this.host.onCut()
  }

  onOverdue(): void {
    this.#link = new Link(this.#link.pool, this)
  }

  get root(): Scope<UnitOfWork> {
    return this.#scopes.root
  }

  get inTransaction(): boolean {
    return this.#link.inTransaction
  }

  get isAutocommit(): boolean {
    return !this.#link.isTransactional
  }

  /** How it ends or has ended; undefined before. */
  get outcome(): 'commit' | 'rollback' | undefined {
    return this.#outcome
  }

  get ended(): boolean {
    return this.#ended !== undefined
  }

  /** Nothing of it can be kept any more, and that is known already. */
  get isFailed(): boolean {
    return this.#link.isFailed || this.#deferred.failure !== undefined
  }

  get state(): SessionState {
    if (this.#ended !== undefined) return 'ended'
    if (this.#link.isFailed) return 'failed'
    return this.#link.isIdle ? 'idle' : 'begun'
  }

  // Statements

  /** Sends one statement of `scope` when it is its turn. */
  run(scope: Scope<UnitOfWork>, text: string, values: unknown[], reads: boolean): Promise<Result> {
    const turn = this.#turn(scope)
    return turn === undefined ? this.#ask(scope, text, values, reads) : this.#askLater(turn, scope, text, values, reads)
  }

  #ask(scope: Scope<UnitOfWork>, text: string, values: unknown[], reads: boolean): Promise<Result> {
    if (!reads) this.owner.memory?.clear()
    return new Promise((resolve, reject) => {
      const step = new Step({ text, values, describe: true }, (error, { result }) => {
        if (error !== undefined) {
          reject(error)
          return
        }
        if (!reads && hasWritten(text, (result as Result).command)) this.owner.hasWritten = true
        resolve(result as Result)
      })
      step.event = ObservedStatement.of(this.#link.pool, this.host, text, values)
      this.#post(scope, step)
    })
  }

  async #askLater(
    first: Promise<void>,
    scope: Scope<UnitOfWork>,
    text: string,
    values: unknown[],
    reads: boolean,
  ): Promise<Result> {
    for (let turn: Promise<void> | undefined = first; turn; turn = this.#turn(scope)) await turn
    return this.#ask(scope, text, values, reads)
  }

  /** The rows of a read that was made in this session already, or is made now by `read`. */
  remember<Row>(scope: Scope<UnitOfWork>, key: string, read: () => Promise<readonly Row[]>): Promise<Row[]> {
    this.#assertUsable()
    this.owner.memory ??= new Memory()
    return this.owner.memory.rows(this.#scopes.around(scope), key, read)
  }

  /** Something is changed in ways that nobody can follow. */
  #isWritten(): void {
    this.owner.hasWritten = true
    this.owner.memory?.clear()
  }

  /** Opens a portal on a statement and reads its rows in chunks. Other statements of the session may go in between. */
  async *read(
    scope: Scope<UnitOfWork>,
    text: string,
    values: unknown[],
    portal: string,
    rows: number,
    reads: boolean,
  ): AsyncGenerator<unknown[]> {
    if (!reads) this.#isWritten()
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
      const isUseful = step.suspended && this.#link.inTransaction && !this.#link.isFailed && this.#ended === undefined
      if (isUseful) this.#link.post([new Step({ portal, closes: true }, () => {})])
    }
  }

  /** Keeps a write until the next statement of `scope`, `flush` or the end. */
  keep(scope: Scope<UnitOfWork>, text: string, values: unknown[]): void {
    this.#assertUsable()
    this.#scopes.assertOpen(scope)
    this.#isWritten()
    const step = this.#deferred.keep(scope, text, values)
    step.event = ObservedStatement.of(this.#link.pool, this.host, text, values)
  }

  /** Sends what `keep` has kept. @throws what the first of them failed with, as pg made it. */
  async flush(scope: Scope<UnitOfWork>): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    const kept = this.#deferred.take(scope)
    if (kept.length === 0) return
    this.#deferred.forgive()
    const last = kept.length - 1
    const posted = this.#link.posted((settle) =>
      kept.map((step, index) => (index === last ? alsoTell(step, settle) : step)),
    )
    const failed = await posted.catch((error: unknown) => error)
    const error = this.#deferred.error ?? failed
    if (error === undefined) return
    if (this.isAutocommit) this.#deferred.forgive()
    throw error
  }

  /** Sends what is kept, if anything is and many wait for connections. @throws what COMMIT would have thrown for it. */
  sendKept(): Promise<void> | undefined {
    if (this.#ended !== undefined || this.root.kept.length === 0 || !this.#link.pool.isCrowded) return undefined
    return this.flush(this.root).catch((error: unknown) => {
      throw this.#deferred.failure ?? error
    })
  }

  /** Begins the transaction without a statement. @throws NESTED_CONFLICT when one is open, or the session is autocommit. */
  async begin(scope: Scope<UnitOfWork>): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    if (this.isAutocommit) {
      throw new NestedConflict('An autocommit session has no begin(): use transaction().execute(fn)')
    }
    if (!this.#link.isIdle) {
      throw new NestedConflict('A transaction is open on this session: use transaction().execute(fn) for a savepoint')
    }
    await this.#link.take([])
  }

  // Savepoints

  /** Begins a savepoint in `parent`. */
  async savepoint(parent: Scope<UnitOfWork>, followed: boolean): Promise<Scope<UnitOfWork>> {
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

  /** Ends a savepoint and keeps what was done in it. */
  async release(scope: Scope<UnitOfWork>): Promise<void> {
    for (let turn = this.#turn(scope); turn; turn = this.#turn(scope)) await turn
    this.#scopes.close(scope)
    await this.#command(scope, `RELEASE SAVEPOINT ${scope.name}`).catch((error: unknown) => {
      throw this.#deferred.failure ?? error
    })
    this.#scopes.pop(scope)
    const parent = this.#scopes.top
    parent.afterCommit.push(...scope.afterCommit)
    parent.afterRollback.push(...scope.afterRollback)
  }

  /** Undoes a savepoint. Never throws: the error that led here is the one to report. */
  async rollbackTo(scope: Scope<UnitOfWork>): Promise<void> {
    scope.kept = []
    this.owner.memory?.clear()
    this.#deferred.forgive()
    try {
      if (!this.#scopes.isToEnd(scope) || !this.#link.inTransaction || this.#ended !== undefined) return
      // What goes on in it must not reach the server behind its end, where it would belong to the parent.
      this.#scopes.close(scope)
      await this.#link.posted((settle) => [
        this.#observed(`ROLLBACK TO SAVEPOINT ${scope.name}`, () => {}),
        this.#observed(`RELEASE SAVEPOINT ${scope.name}`, settle),
      ])
    } catch (error) {
      this.host.log.error({ err: error }, 'request-db: rolling back to a savepoint failed')
    } finally {
      this.#scopes.pop(scope)
    }
  }

  /** Lends the raw client to `fn`; the session's own statements wait meanwhile. */
  async withClient<T>(parent: Scope<UnitOfWork>, fn: (client: pg.Client) => Promise<T>): Promise<T> {
    for (let turn = this.#turn(parent); turn; turn = this.#turn(parent)) await turn
    const scope = this.#scopes.push('client', true)
    this.#isWritten()
    const link = this.#link
    link.pin()
    try {
      await link.take(this.#deferred.take(parent))
      this.#assertUsable()
      if (this.#deferred.failure !== undefined) throw this.#deferred.failure
      return await link.lend((client) =>
        nest(this.owner, () => {
          enter(this.owner, scope)
          return fn(client)
        }),
      )
    } finally {
      this.#scopes.pop(scope)
      link.unpin()
    }
  }

  /** Runs `fn` with one connection for all of its statements, also where there is no transaction around them. */
  async held<T>(fn: () => Promise<T>): Promise<T> {
    const link = this.#link
    link.pin()
    try {
      return await fn()
    } finally {
      link.unpin()
    }
  }

  get poolName(): string {
    return this.#link.pool.options.name
  }

  /** It has a connection that it keeps from one statement to the next, without a transaction. */
  get isHolding(): boolean {
    return this.isAutocommit && this.#link.isHolding
  }

  /** Notes what to call after the end of `scope`'s transaction. */
  callAfter(scope: Scope<UnitOfWork>, end: 'afterCommit' | 'afterRollback', callback: Callback): void {
    if (this.#ended !== undefined) throw this.#endedError()
    const accountable = this.#scopes.accountable(scope)
    this.#scopes.assertOpen(accountable)
    // It will be called by whatever ends the transaction, such as a socket that another request has opened.
    accountable[end].push(isFollowing() ? AsyncResource.bind(() => outside(callback)) : () => outside(callback))
  }

  /** Has the server stop what runs now; its statement fails with 57014. */
  cancelRunning(): Promise<void> {
    return this.#link.cancelRunning()
  }

  // Children

  /** A transaction of its own, on a connection of its own, inside an autocommit session. It ends with the session. */
  openChild(begin: string): UnitOfWork {
    this.#assertUsable()
    const child = new UnitOfWork(this.#link.pool, this.host, begin, this.owner)
    this.#children ??= new Set()
    this.#children.add(child)
    return child
  }

  async closeChild(child: UnitOfWork, outcome: 'commit' | 'rollback'): Promise<void> {
    try {
      await child.settle(outcome, 'its transaction has ended')
    } finally {
      this.#children?.delete(child)
    }
  }

  // The end

  /** Commits; the unit can be used again. */
  commit(scope: Scope<UnitOfWork>): Promise<void> {
    return this.#endTransaction(scope, () => this.#commit())
  }

  /** Rolls back; the unit can be used again. */
  rollback(scope: Scope<UnitOfWork>): Promise<void> {
    return this.#endTransaction(scope, () => this.#rollback(false))
  }

  /**
   * Ends the unit for good. Undefined when there was nothing to end. However often it is called, there is one settlement;
   * a commit asked for after a rollback is refused.
   */
  settle(outcome: 'commit' | 'rollback', why: string | RequestDbError): Promise<void> | undefined {
    if (this.#ended !== undefined) {
      return outcome === 'commit' && this.#outcome === 'rollback'
        ? Promise.reject(this.#endedError())
        : this.#settlement
    }
    this.#ended = why
    this.#outcome = outcome
    this.#link.over()
    if (outcome === 'commit') this.#link.pool.inspector?.ends(this.who, this.#link.unanswered, this.#isNested)
    this.#scopes.refuseAll(() => this.#endedError())
    if (this.#isUntouched) return undefined
    const isCalm = outcome === 'commit' && this.#isCalm
    const canLeaveEarly = isCalm && this.host.isCommitCertain && this.root.kept.length === 0
    this.#settlement = isCalm ? this.#commitNow() : this.#settle(outcome)
    if (!canLeaveEarly) return this.#settlement
    this.#settlement = this.#settlement.catch((error: unknown) => {
      this.host.log.error({ err: error }, 'request-db: COMMIT of a read-only session failed')
    })
    return undefined
  }

  /** Ends it because nobody is left to answer. Once COMMIT is sent, that stands. Never throws. */
  async abandon(why: string | RequestDbError): Promise<void> {
    const isMine = this.#ended === undefined
    const isCommitting = isMine ? this.#ending !== undefined : this.#outcome === 'commit'
    const settlement = this.settle('rollback', why)
    this.#abandoned = true
    // A COMMIT that waits for a connection, or for a statement that nobody awaited, has not been sent.
    if (this.#link.isBoarding) this.#link.leaveQueue(() => this.#endedError())
    else if (isCommitting) this.#link.hurry()
    try {
      await settlement
    } catch (error) {
      // Who began the settlement reports its failure.
      if (isMine) this.host.log.error({ err: error }, 'request-db: ending a session failed')
    }
  }

  // Nothing is under way or unfinished whose failure COMMIT would have to tell.
  get #isCalm(): boolean {
    const isAlone = this.#scopes.top === this.root && !this.#children?.size && this.#ending === undefined
    const link = this.#link
    const isWell = !this.isAutocommit && !link.isFailed && this.#deferred.error === undefined
    const isQuiet = link.isQuiet && link.cancelling === undefined
    return isAlone && isWell && isQuiet && !(link.isIdle && this.root.kept.length === 0)
  }

  get #isNested(): boolean {
    return this.#scopes.top !== this.root || !!this.#children?.size
  }

  get #isUntouched(): boolean {
    const { root } = this
    const hasWork = !this.#link.isIdle || root.kept.length > 0 || this.#ending !== undefined || !!this.#children?.size
    return !hasWork && this.#deferred.error === undefined && root.afterCommit.length + root.afterRollback.length === 0
  }

  async #endTransaction(scope: Scope<UnitOfWork>, how: () => Promise<void>): Promise<void> {
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
    // A commit() or rollback() by hand is under way: it comes first, and as nobody awaits it, its failure is ours.
    let failure: unknown
    await this.#ending?.catch((error: unknown) => {
      failure = error
    })
    this.#scopes.lock()
    const children = [...(this.#children ?? [])]
    await Promise.all(children.map((child) => child.abandon('its session has ended')))
    const open = this.#scopes.top
    // Half of a nested transaction must not be kept, and its raw client cannot be taken away.
    if (open.kind === 'client') {
      await this.#link.stopLent('The session ended while its raw client was lent out')
    }
    const isUnfinished = open !== this.root || children.length > 0
    if (isUnfinished) failure ??= new NestedConflict(UNAWAITED)
    if (outcome === 'commit' && failure === undefined) return this.#commit()
    await this.#rollback()
    if (outcome === 'commit') throw failure
  }

  async #commit(): Promise<void> {
    const kept = this.#deferred.take(this.root)
    const error = this.isAutocommit ? await this.#finish(kept) : await this.#sendCommit(kept)
    if (error !== undefined) await this.#failCommit(error)
    else this.#committed()
  }

  // Nothing has to be waited for first.
  #commitNow(): Promise<void> {
    this.#scopes.lock()
    return new Promise((resolve) => {
      this.#link.commit(this.#deferred.take(this.root), (error, tag) => {
        if (error === undefined && tag === 'COMMIT') {
          this.#link.pool.ledger.totals.commits++
          this.hasCommitted = true
          this.#committed()
          resolve()
        } else resolve(this.#failCommit(this.#commitError(error)))
      })
    })
  }

  #committed(): void {
    this.#link.reset()
    this.#callBack(this.root.afterCommit, true)
  }

  async #failCommit(error: Error): Promise<never> {
    this.#link.pool.ledger.totals.failedCommits++
    // Neither outcome is certain, so neither kind of callback is right.
    if (error instanceof CommitUnknown) this.root.afterRollback = []
    await this.#rollback()
    throw error
  }

  /** Without transactions there is only the rest to wait for. */
  async #finish(kept: Step[]): Promise<Error | undefined> {
    if (kept.length > 0) this.#link.post(kept)
    await this.#link.returned()
    return this.#deferred.failure
  }

  /** Sends COMMIT with what was kept before it, in one flight. Resolves with what went wrong. */
  async #sendCommit(kept: Step[]): Promise<Error | undefined> {
    // Statements that nobody awaited come first, and take the time they take: the deadline is COMMIT's.
    const link = this.#link
    if (!link.isIdle) {
      await link.quietOrDoomed()
      // Whoever heard of a refusal before may have made do without; one that nobody awaited is the commit's to tell.
      const refusal = link.doom ?? link.refusal
      if (refusal !== undefined) return refusal as Error
    }
    await link.cancelling
    if (link.doom !== undefined) return link.doom
    if (this.#abandoned) return this.#endedError()
    // Of a deferred write that left with a statement and was refused, nobody has been told.
    if (this.#deferred.failure !== undefined) return this.#deferred.failure
    if (link.isIdle && kept.length === 0) return undefined
    return new Promise((resolve) => {
      link.commit(kept, (error, tag) => {
        if (error === undefined && tag === 'COMMIT') {
          link.pool.ledger.totals.commits++
          this.hasCommitted = true
          resolve(undefined)
        } else resolve(this.#commitError(error))
      })
    })
  }

  #commitError(error: unknown): Error {
    const { failure } = this.#deferred
    if (error instanceof CommitUnknown) return error
    if (failure !== undefined) return failure
    const { name } = this.#link.pool.options
    if (error === undefined) return new TransactionAborted(name, 'a statement failed and the app went on without it')
    return sqlStateOf(error) === undefined ? (error as Error) : new SettleFailed('COMMIT', name, error as Error)
  }

  /** Leaves nothing behind on the server or in the queue. Never throws: a connection that does not obey is killed. */
  async #rollback(isReset = true): Promise<void> {
    this.#scopes.reset()
    this.#link.leaveQueue(() => this.#endedError())
    const error = await this.#link.rollBack(isReset)
    if (error !== undefined)
      this.host.log.warn({ err: error }, 'request-db: ROLLBACK failed, its connection is dropped')
    this.#link.reset()
    this.#deferred.reset()
    this.#callBack(this.root.afterRollback)
  }

  #callBack(callbacks: Callback[], isCommit = false): void {
    this.#deferred.reset()
    this.owner.memory?.clear()
    const { root } = this
    if (root.afterCommit.length + root.afterRollback.length === 0) return
    root.afterCommit = []
    root.afterRollback = []
    const { inspector } = this.#link.pool
    for (const callback of callbacks) {
      if (isCommit && inspector?.due !== undefined) {
        inspector.due(this.who, callback)
        continue
      }
      // Asynchronous or not: nobody waits for it, and nobody is answered what it throws.
      new Promise((resolve) => resolve(callback())).catch((error: unknown) => {
        this.host.log.error({ err: error }, 'request-db: a callback of afterCommit or afterRollback failed')
      })
    }
  }

  // Inside

  #assertUsable(): void {
    if (this.#ended !== undefined) throw this.#endedError()
    if (this.#used) return
    this.host.onFirstUse()
    this.#used = true
  }

  #endedError(): RequestDbError {
    const why = this.#ended ?? 'it was rolled back'
    return typeof why === 'string' ? new SessionEnded(this.#link.pool.options.name, why) : why
  }

  /**
   * Undefined when `scope` may act this very moment. Otherwise await it and ask again, since a sibling may have been
   * faster, and then act without another await in between.
   */
  #turn(scope: Scope<UnitOfWork>): Promise<void> | undefined {
    this.#assertUsable()
    return this.#scopes.turn(scope)
  }

  /** Sends a statement of the app, and what was kept before it, and waits for its answer. */
  #statement(scope: Scope<UnitOfWork>, spec: Step['spec'], result?: Result): Promise<Step> {
    return new Promise((resolve, reject) => {
      const step = new Step(spec, (error) => (error === undefined ? resolve(step) : reject(error)))
      step.result = result
      const { text, values = [] } = spec
      if (text !== undefined) step.event = ObservedStatement.of(this.#link.pool, this.host, text, values)
      this.#post(scope, step)
    })
  }

  #post(scope: Scope<UnitOfWork>, step: Step): void {
    const steps = this.#deferred.take(scope)
    steps.push(step)
    this.#link.post(steps)
  }

  /** Sends a command of ours in `scope`. */
  #command(scope: Scope<UnitOfWork>, text: string): Promise<void> {
    return this.#link.posted((settle) => [...this.#deferred.take(scope), this.#observed(text, settle)])
  }

  #observed(text: string, settle: (error: unknown) => void): Step {
    const step = new Step({ text }, settle)
    step.event = ObservedStatement.of(this.#link.pool, this.host, text, [])
    return step
  }
}

function alsoTell(step: Step, settle: (error: unknown) => void): Step {
  const both = new Step(step.spec, (error) => {
    step.settle(error)
    settle(error)
  })
  both.event = step.event
  step.event = undefined
  return both
}
