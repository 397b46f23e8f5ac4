import { setTimeout as pause } from 'node:timers/promises'
import { sql } from 'kysely'
import type { Session } from '../../../lib/index.ts'
import type { Program, Step } from './program.ts'

/** What a transaction has to come to, as far as its handler can know. */
export type Fate = 'kept' | 'gone' | 'either' | 'open'

/** One transaction of a handler: what it has written, and what has become of it. */
export interface Segment {
  /** Those that are there if it is kept. */
  rows: string[]
  fate: Fate
}

/** Rows of a savepoint, or of the whole transaction, before it is known whether they stay. */
interface Scope {
  rows: string[]
  /** A statement failed in it, and the handler went on. */
  isPoisoned: boolean
}

class Mine extends Error {}

/** Runs a program as a handler would, and keeps the books of what must be in the table then. */
export class Unit {
  readonly id: string
  readonly program: Program
  readonly segments: Segment[] = []
  /** What went against the rules while it ran. */
  readonly complaints: string[] = []
  #scopes: Scope[] = [{ rows: [], isPoisoned: false }]
  #rows = 0
  readonly #forgotten: Promise<unknown>[] = []

  constructor(id: string, program: Program) {
    this.id = id
    this.program = program
  }

  /** The handler's part. @throws whatever a handler would let through. */
  async run(db: Session): Promise<void> {
    for (const step of this.program.steps) await this.#do(step, db)
  }

  /** After the answer. */
  async useLate(db: Session): Promise<void> {
    const used = sql`select 1`.execute(db).then(() => this.complaints.push('a session was used after its answer'))
    this.#forgotten.push(used.catch(() => {}))
  }

  /** To be called when the request is over: the last transaction's fate is for the answer to tell. */
  async over(): Promise<void> {
    await Promise.allSettled(this.#forgotten)
    this.segments.push({ rows: this.#scope.rows, fate: this.#scope.isPoisoned ? 'gone' : 'open' })
  }

  get #scope(): Scope {
    return this.#scopes.at(-1) as Scope
  }

  #name(): string {
    return `${this.id}/${this.segments.length}/${++this.#rows}`
  }

  #insert(db: Session, row: string) {
    return db.withTables<{ deeds: { row: string } }>().insertInto('deeds').values({ row })
  }

  async #do(step: Step, db: Session): Promise<void> {
    if (step.do === 'nest') return this.#nest(step, db)
    if (step.do === 'parallel') return this.#parallel(step.statements, db)
    const rows = this.#scope.rows
    if (step.do === 'read') await sql`select count(*) from deeds`.execute(db)
    if (step.do === 'pause') await pause(1)
    if (step.do === 'flush') await db.flush()
    if (step.do === 'throw') throw new Mine('thrown by the handler')
    if (step.do === 'fail') await sql`select 1 / 0`.execute(db)
    if (step.do === 'swallow') await this.#swallow(db)
    if (step.do === 'write') {
      const row = this.#name()
      await this.#insert(db, row).execute()
      rows.push(row)
    }
    if (step.do === 'add') {
      const row = this.#name()
      db.add(this.#insert(db, row))
      rows.push(row)
    }
    if (step.do === 'forget') this.#forget(db)
    if (step.do === 'commit' || step.do === 'rollback') await this.#end(step.do, db)
  }

  async #swallow(db: Session): Promise<void> {
    const error = await sql`select 1 / 0`.execute(db).catch((error: unknown) => error)
    // Who never got a connection has no transaction that could have failed, and may try again.
    if (!isRefused(error)) this.#scope.isPoisoned = true
  }

  // Its row is kept with the transaction or not at all; only whether it got in at all is for nobody to know.
  #forget(db: Session): void {
    this.#forgotten.push(sql`select pg_sleep(0.001)`.execute(db).catch(() => {}))
  }

  async #parallel(statements: number, db: Session): Promise<void> {
    const names = Array.from({ length: statements }, () => this.#name())
    await Promise.all(names.map((row) => this.#insert(db, row).execute()))
    this.#scope.rows.push(...names)
  }

  async #nest({ steps, isUndone }: Extract<Step, { do: 'nest' }>, db: Session): Promise<void> {
    const scope: Scope = { rows: [], isPoisoned: false }
    const undo = new Mine('undo this part')
    const depth = this.#scopes.length
    try {
      await db.transaction().execute(async () => {
        this.#scopes.push(scope)
        for (const step of steps) await this.#do(step, db)
        if (isUndone) throw undo
      })
    } catch (error) {
      this.#scopes.length = depth
      if (error !== undo) throw error
      return
    }
    this.#scopes.length = depth
    if (scope.isPoisoned) this.complaints.push('a savepoint with a failed statement was released')
    this.#scope.rows.push(...scope.rows)
  }

  async #end(how: 'commit' | 'rollback', db: Session): Promise<void> {
    // Inside of a nested transaction it is refused, which the handler lets through.
    const isOutermost = this.#scopes.length === 1
    const { rows, isPoisoned } = this.#scope
    let fate: Fate = how === 'commit' ? 'kept' : 'gone'
    try {
      await db[how]()
      if (!isOutermost) this.complaints.push(`${how}() inside of a nested transaction was not refused`)
      if (fate === 'kept' && isPoisoned) this.complaints.push('a transaction with a failed statement was committed')
    } catch (error) {
      fate = isUnknown(error) ? 'either' : 'gone'
      throw error
    } finally {
      if (isOutermost) {
        this.segments.push({ rows, fate })
        this.#scopes = [{ rows: [], isPoisoned: false }]
      }
    }
  }
}

const isRefused = (error: unknown): boolean =>
  (error as { code?: unknown } | undefined)?.code === 'FST_REQUEST_DB_UNAVAILABLE'
export const isUnknown = (error: unknown): boolean =>
  (error as { code?: unknown } | undefined)?.code === 'FST_REQUEST_DB_COMMIT_UNKNOWN'
