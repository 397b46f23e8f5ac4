import {
  CompiledQuery,
  type DatabaseConnection,
  type Dialect,
  type Driver,
  type KyselyConfig,
  PostgresAdapter,
  PostgresIntrospector,
  PostgresQueryCompiler,
  type QueryResult,
  type TransactionSettings,
} from 'kysely'
import pg from 'pg'
import { NestedConflict, PoolSaturated, TransactionAborted } from '../errors.ts'
import { mapValues, type Result } from '../pool/flight.ts'
import { type BeginOptions, beginStatement } from './begin.ts'
import { surelyReads } from './reads.ts'
import { currentScope, enter, isFollowed, type Scope } from './scope.ts'
import type { UnitOfWork } from './transaction.ts'

const COUNTED = new Set(['INSERT', 'UPDATE', 'DELETE', 'MERGE'])
let portals = 0

/**
 * What Kysely takes for a connection: the unit of work, seen from one place in the code. A transaction that Kysely
 * begins on it is a savepoint, and everything sent through it from then on belongs to that savepoint.
 */
export class SessionConnection implements DatabaseConnection {
  readonly #unit: UnitOfWork
  readonly #begin: BeginOptions
  readonly #begun: Scope<UnitOfWork>[] = []
  // A transaction on a connection that was held before it, and will be after it.
  #isInside = false

  constructor(unit: UnitOfWork, begin: BeginOptions) {
    this.#unit = unit
    this.#begin = begin
  }

  get #scope(): Scope<UnitOfWork> {
    return this.#begun[this.#begun.length - 1] ?? currentScope(this.#unit)
  }

  async executeQuery<R>(query: CompiledQuery): Promise<QueryResult<R>> {
    try {
      const values = mapValues(query.parameters)
      const scope = this.#scope
      return toQueryResult<R>(await scope.unit.run(scope, query.sql, values, surelyReads(query)))
    } catch (error) {
      throw withCallSite(error)
    }
  }

  async *streamQuery<R>(query: CompiledQuery, chunkSize = 100): AsyncIterableIterator<QueryResult<R>> {
    try {
      yield* this.#stream<R>(query, chunkSize)
    } catch (error) {
      throw withCallSite(error)
    }
  }

  async *#stream<R>(query: CompiledQuery, chunkSize: number): AsyncIterableIterator<QueryResult<R>> {
    if (!Number.isInteger(chunkSize) || chunkSize < 1) throw new RangeError('chunkSize must be a whole number above 0')
    const values = mapValues(query.parameters)
    const portal = `request_db_${++portals}`
    const scope = this.#scope
    const { sql } = query
    const reads = surelyReads(query)
    if (!scope.unit.isAutocommit || this.#isInside) {
      for await (const rows of scope.unit.read(scope, sql, values, portal, chunkSize, reads))
        yield { rows: rows as R[] }
      return
    }
    // A portal lives as long as its transaction, so an autocommit session reads in one of its own.
    const child = scope.unit.openChild(beginStatement(this.#begin))
    let outcome: 'commit' | 'rollback' = 'rollback'
    try {
      for await (const rows of child.read(child.root, sql, values, portal, chunkSize, reads))
        yield { rows: rows as R[] }
      outcome = 'commit'
    } finally {
      await scope.unit.closeChild(child, outcome)
    }
  }

  /** Kysely 0.29, `execute({ signal, inflightQueryAbortStrategy: 'cancel query' })`. */
  async cancelQuery(): Promise<void> {
    await this.#scope.unit.cancelRunning()
  }

  async begin(settings: TransactionSettings): Promise<void> {
    const parent = this.#scope
    const unit = parent.unit
    if (!unit.isAutocommit) {
      if (settings.isolationLevel !== undefined || settings.accessMode !== undefined) {
        throw new NestedConflict(
          'A nested transaction is a savepoint and cannot have an isolation level or access mode of its own: ' +
            'set it with the options of the route or the plugin',
        )
      }
      this.#begun.push(await unit.savepoint(parent, isFollowed(unit.owner)))
      return
    }
    const begin = beginStatement({ ...this.#begin, ...own(settings) })
    if (unit.isHolding) {
      await unit.run(parent, begin, [], true)
      this.#isInside = true
      return
    }
    const child = unit.openChild(begin)
    enter(unit.owner, child.root)
    this.#begun.push(child.root)
  }

  async commit(): Promise<void> {
    if (this.#isInside) {
      await this.#commitInside()
      return
    }
    const scope = this.#begun[this.#begun.length - 1] as Scope<UnitOfWork>
    if (scope.kind === 'savepoint') await scope.unit.release(scope)
    else await scope.unit.owner.closeChild(scope.unit, 'commit')
    this.#begun.pop()
  }

  async #commitInside(): Promise<void> {
    this.#isInside = false
    const { unit } = this.#scope
    const { command } = await unit.run(unit.root, 'COMMIT', [], true)
    if (command !== 'COMMIT')
      throw new TransactionAborted('kysely', 'a statement failed and the app went on without it')
  }

  async rollback(): Promise<void> {
    if (this.#isInside) {
      this.#isInside = false
      const { unit } = this.#scope
      // Where that fails, the connection is gone, and the transaction with it.
      await unit.run(unit.root, 'ROLLBACK', [], true).catch(() => {})
      return
    }
    const scope = this.#begun.pop()
    if (scope === undefined) return
    if (scope.kind === 'savepoint') await scope.unit.rollbackTo(scope)
    else await scope.unit.owner.closeChild(scope.unit, 'rollback')
  }
}

/** Kysely's driver for sessions. It is the same for all: everything is in the connection it is handed. */
export const sessionDriver: Driver = {
  async init() {},
  async acquireConnection() {
    throw new Error('A session brings its own connection')
  },
  beginTransaction: (connection, settings) => (connection as SessionConnection).begin(settings),
  commitTransaction: (connection) => (connection as SessionConnection).commit(),
  rollbackTransaction: (connection) => (connection as SessionConnection).rollback(),
  savepoint: (connection, name) => command(connection, `savepoint ${pg.escapeIdentifier(name)}`),
  rollbackToSavepoint: (connection, name) => command(connection, `rollback to ${pg.escapeIdentifier(name)}`),
  releaseSavepoint: (connection, name) => command(connection, `release ${pg.escapeIdentifier(name)}`),
  async releaseConnection() {},
  /** The pool is the app's: `request.db.destroy()` ends nothing. */
  async destroy() {},
}

async function command(connection: DatabaseConnection, text: string): Promise<void> {
  await connection.executeQuery(CompiledQuery.raw(text))
}

/** PostgreSQL's dialect on that driver. */
export const sessionDialect: Dialect = {
  createDriver: () => sessionDriver,
  createQueryCompiler: () => new PostgresQueryCompiler(),
  createAdapter: () => new PostgresAdapter(),
  createIntrospector: (db) => new PostgresIntrospector(db),
}
export const sessionConfig: KyselyConfig = { dialect: sessionDialect }

function toQueryResult<R>({ command, rowCount, rows }: Result): QueryResult<R> {
  const isCounted = command !== null && COUNTED.has(command)
  return isCounted ? { rows: rows as R[], numAffectedRows: BigInt(rowCount ?? 0) } : { rows: rows as R[] }
}

function own({ isolationLevel, accessMode }: TransactionSettings): Partial<BeginOptions> {
  return {
    ...(isolationLevel !== undefined && isolationLevel !== 'snapshot' && { isolationLevel }),
    ...(accessMode !== undefined && { readOnly: accessMode === 'read only' }),
  }
}

// The stack of what the server said ends in the socket; the code that asked is what the reader looks for.
function withCallSite(error: unknown): unknown {
  // Who is refused at once has it already, and formatting one costs more than the refusal.
  if (error instanceof Error && !(error instanceof PoolSaturated)) {
    const here = { stack: '' }
    Error.captureStackTrace(here, withCallSite)
    error.stack += here.stack.slice(here.stack.indexOf('\n'))
  }
  return error
}
