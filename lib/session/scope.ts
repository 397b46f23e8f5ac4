import { AsyncLocalStorage } from 'node:async_hooks'
import { NestedConflict } from '../errors.ts'
import type { Step } from '../pool/flight.ts'

/** What `afterCommit` and `afterRollback` take. */
export type Callback = () => unknown

type ScopeKind = 'session' | 'savepoint' | 'client'

/**
 * A part of a session that begins and ends as one: the session itself, a savepoint in it, or the time its raw client is
 * lent out. Scopes are a stack: only the innermost may send statements, because a savepoint takes along whatever
 * reached the server after it.
 */
export class Scope<Unit> {
  /** The unit of work it belongs to. */
  readonly unit: Unit
  readonly kind: ScopeKind
  readonly name: string
  /** Driven by a callback whose awaits we can follow, or, false, by somebody who holds a handle. */
  readonly followed: boolean
  open = true
  /** Deferred writes, in the order they were added. */
  kept: Step[] = []
  afterCommit: Callback[] = []
  afterRollback: Callback[] = []

  constructor(unit: Unit, kind: ScopeKind, name: string, followed: boolean) {
    this.unit = unit
    this.kind = kind
    this.name = name
    this.followed = followed
  }
}

interface Turn<Unit> {
  readonly scope: Scope<Unit>
  readonly go: () => void
  readonly refuse: (error: Error) => void
}

/** The stack of open scopes, and who waits for their turn. */
export class Scopes<Unit> {
  readonly root: Scope<Unit>
  readonly #stack: Scope<Unit>[]
  readonly #patienceMillis: number
  #turns: Set<Turn<Unit>> | undefined
  #locked = false
  #named = 0

  constructor(unit: Unit, patienceMillis: number) {
    this.root = new Scope(unit, 'session', '', true)
    this.#stack = [this.root]
    this.#patienceMillis = patienceMillis
  }

  get top(): Scope<Unit> {
    return this.#stack[this.#stack.length - 1] as Scope<Unit>
  }

  /** `scope` and what it is nested in, outermost first. */
  around(scope: Scope<Unit>): readonly Scope<Unit>[] {
    return this.#stack.slice(0, this.#stack.indexOf(scope) + 1)
  }

  get locked(): boolean {
    return this.#locked
  }

  /** Undefined when `scope` may act now; otherwise a promise for its turn. @throws NESTED_CONFLICT */
  turn(scope: Scope<Unit>): Promise<void> | undefined {
    this.#assertPossible(scope)
    if (this.top === scope && !this.#locked) return undefined
    return this.#waitFor(scope)
  }

  /** Where callbacks of `scope` go: the raw client's time is no transaction of its own. */
  accountable(scope: Scope<Unit>): Scope<Unit> {
    const at = this.#stack.indexOf(scope)
    return scope.kind === 'client' && at > 0 ? this.accountable(this.#stack[at - 1] as Scope<Unit>) : scope
  }

  push(kind: ScopeKind, followed: boolean): Scope<Unit> {
    const scope = new Scope(this.root.unit, kind, `request_db_${++this.#named}`, followed)
    this.#stack.push(scope)
    return scope
  }

  /** From now on `scope`, and whatever is open in it, takes no more statements; its own end is being sent. */
  close(scope: Scope<Unit>): void {
    const at = this.#stack.indexOf(scope)
    if (at < 1) return
    for (const ending of this.#stack.slice(at)) ending.open = false
    this.#wake()
  }

  /** Whether `scope` is still to be ended, and does not end with one around it. */
  isToEnd(scope: Scope<Unit>): boolean {
    return this.#stack[this.#stack.indexOf(scope) - 1]?.open === true
  }

  /** Ends `scope` and whatever is still open in it. */
  pop(scope: Scope<Unit>): void {
    const at = this.#stack.indexOf(scope)
    if (at === -1) return
    for (const ended of this.#stack.splice(Math.max(1, at))) ended.open = false
    this.#wake()
  }

  /** Ends everything but the session itself. */
  reset(): void {
    for (const ended of this.#stack.splice(1)) ended.open = false
    this.root.kept = []
    this.#wake()
  }

  /** Nobody acts until `unlock`: COMMIT or ROLLBACK is under way. */
  lock(): void {
    this.#locked = true
  }

  unlock(): void {
    this.#locked = false
    this.#wake()
  }

  /** Nobody will get a turn any more. */
  refuseAll(reason: () => Error): void {
    for (const turn of [...(this.#turns ?? [])]) turn.refuse(reason())
  }

  /** @throws NESTED_CONFLICT when `scope` takes no statements any more, or never did. */
  assertOpen(scope: Scope<Unit>): void {
    if (!scope.open) {
      throw new NestedConflict('This nested transaction has ended: await what it does inside its callback')
    }
    if (scope.kind === 'client') throw new NestedConflict('Inside withClient(fn) use the client it hands you')
  }

  #assertPossible(scope: Scope<Unit>): void {
    this.assertOpen(scope)
    const { top } = this
    if (top !== scope && top.open && !top.followed) {
      throw new NestedConflict('A controlled transaction is open on this session: use its handle, or end it first')
    }
  }

  #waitFor(scope: Scope<Unit>): Promise<void> {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        turn.refuse(
          new NestedConflict('A nested transaction of this session did not end in time: await one before the next'),
        )
      }, this.#patienceMillis)
      const leave = () => {
        clearTimeout(timer)
        this.#turns?.delete(turn)
      }
      const turn: Turn<Unit> = {
        scope,
        go: () => {
          leave()
          resolve()
        },
        refuse: (error) => {
          leave()
          reject(error)
        },
      }
      this.#turns ??= new Set()
      this.#turns.add(turn)
    })
  }

  #wake(): void {
    if (this.#locked || this.#turns === undefined) return
    for (const turn of [...this.#turns]) if (turn.scope === this.top || !turn.scope.open) turn.go()
  }
}

interface Nesting {
  readonly owner: object
  scope: Scope<unknown> | undefined
  readonly outer: Nesting | undefined
}

// Entered by nested callbacks only: what never nests pays nothing for it.
const nestings = new AsyncLocalStorage<Nesting>()

/** Runs `fn` so that everything in its chain of awaits belongs to the scope that `enter` will name. */
export function nest<T>(owner: object, fn: () => T): T {
  return nestings.run({ owner, scope: undefined, outer: nestings.getStore() }, fn)
}

/** Runs `fn` in no scope but the session's own. */
export function outside<T>(fn: () => T): T {
  return nestings.exit(fn)
}

/** Names the scope of the innermost `nest`, if that has none yet. */
export function enter(owner: object, scope: Scope<unknown>): void {
  const nesting = nestings.getStore()
  if (nesting?.owner === owner && nesting.scope === undefined) nesting.scope = scope
}

/** Whether a `nest` waits for its scope: the callback style of a transaction. */
export function isFollowed(owner: object): boolean {
  const nesting = nestings.getStore()
  return nesting?.owner === owner && nesting.scope === undefined
}

/** The scope of `owner` that the running code belongs to. */
export function currentScope<Unit extends { readonly root: Scope<Unit> }>(owner: Unit): Scope<Unit> {
  for (let nesting = nestings.getStore(); nesting !== undefined; nesting = nesting.outer) {
    if (nesting.owner === owner && nesting.scope !== undefined) return nesting.scope as Scope<Unit>
  }
  return owner.root
}
