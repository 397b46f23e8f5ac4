import {
  type Compilable,
  type CompiledQuery,
  type ConnectionProvider,
  DefaultQueryExecutor,
  Kysely,
  type IsolationLevel as KyselyIsolationLevel,
  type KyselyPlugin,
  type KyselyProps,
  PostgresAdapter,
  PostgresQueryCompiler,
  type QueryExecutor,
  type QueryResult,
  type Transaction,
  TransactionBuilder,
  WithSchemaPlugin,
} from 'kysely'
import type pg from 'pg'
import { mapValues } from '../pool/flight.ts'
import type { BeginOptions } from './begin.ts'
import { SessionConnection, sessionConfig, sessionDialect, sessionDriver } from './driver.ts'
import { keyOf } from './memory.ts'
import { vouchFor } from './reads.ts'
import { type Callback, currentScope, nest } from './scope.ts'
import type { SessionState, UnitOfWork } from './transaction.ts'

const compiler = new PostgresQueryCompiler()
const adapter = new PostgresAdapter()

/** A Kysely executor whose statements go through the unit of work that `provide` names. @internal */
export function executorOf(provider: ConnectionProvider, plugins: readonly KyselyPlugin[]): QueryExecutor {
  return new DefaultQueryExecutor(compiler, adapter, provider, [...plugins])
}

/** The executor of a session: without plugins, nothing stands between a query and its unit of work. */
class SessionExecutor extends DefaultQueryExecutor {
  readonly #connection: SessionConnection

  constructor(connection: SessionConnection, provider: ConnectionProvider, plugins: KyselyPlugin[]) {
    super(compiler, adapter, provider, plugins)
    this.#connection = connection
  }

  // With the options of Kysely 0.29, such as a signal, Kysely has more to do.
  override executeQuery<R>(query: CompiledQuery, ...options: object[]): Promise<QueryResult<R>> {
    const isPlain = options[0] === undefined && this.plugins.length === 0
    if (isPlain) return this.#connection.executeQuery<R>(query)
    return super.executeQuery<R>(...([query, ...options] as unknown as [CompiledQuery]))
  }
}

/** What Kysely is made of, around an executor. @internal */
export function propsOf(executor: QueryExecutor): KyselyProps {
  return { config: sessionConfig, dialect: sessionDialect, driver: sessionDriver, executor }
}

/**
 * A database session: one unit of work on at most one connection. All of Kysely works on it; its first statement checks
 * out a connection and begins the transaction. SQLAlchemy: `Session` over `Connection`.
 *
 * Every method that uses the database throws SESSION_ENDED after the end, CONNECTION_LOST once the connection has died,
 * and NESTED_CONFLICT where another nested transaction is in the way.
 */
export class Session<DB> extends Kysely<DB> {
  readonly #unit: UnitOfWork
  readonly #executor: QueryExecutor

  /** Sessions are made by the plugin: `request.db`, `fastify.db.session(fn)`. @internal */
  constructor(unit: UnitOfWork, executor: QueryExecutor) {
    super(propsOf(executor))
    this.#unit = unit
    this.#executor = executor
  }

  /** Whether a transaction is open on the server. SQLAlchemy: `in_transaction()`. */
  get inTransaction(): boolean {
    return this.#unit.inTransaction
  }

  /**
   * `'idle'`: nothing begun, no connection. `'begun'`: a transaction is open, or on its way. `'failed'`: only a rollback
   * is left. `'ended'`: over, every use is an error.
   */
  get state(): SessionState {
    return this.#unit.state
  }

  /** Begins the transaction now instead of with the first statement. @throws NESTED_CONFLICT when one is open. SQLAlchemy: `begin()`. */
  async begin(): Promise<void> {
    await this.#unit.begin(currentScope(this.#unit))
  }

  /**
   * Commits what was done so far and checks the connection in; the session can be used again and begins anew.
   * @throws COMMIT_UNKNOWN, TRANSACTION_ABORTED, or an error with PostgreSQL's SQLSTATE in `code`. SQLAlchemy: `commit()`.
   */
  async commit(): Promise<void> {
    await this.#unit.commit(currentScope(this.#unit))
  }

  /** Rolls back what was done since the last `commit()` and checks the connection in. SQLAlchemy: `rollback()`. */
  async rollback(): Promise<void> {
    await this.#unit.rollback(currentScope(this.#unit))
  }

  /**
   * Keeps a write until `flush()`, the next statement, or the commit, and then sends all that is kept together: a request
   * that only adds costs one round trip. What it returns is dropped. @throws at once what compiling it, or mapping its
   * parameters, throws. SQLAlchemy: `add()`.
   */
  add(query: Compilable): void {
    const { sql, parameters } = query.compile()
    const scope = currentScope(this.#unit)
    scope.unit.keep(scope, sql, mapValues(parameters))
  }

  /** Sends what `add` has kept. @throws PostgreSQL's error of the first write that failed. SQLAlchemy: `flush()`. */
  async flush(): Promise<void> {
    const scope = currentScope(this.#unit)
    await scope.unit.flush(scope)
  }

  /**
   * Runs a read once, and answers the same rows to whoever asks for the same SQL with the same values in this session,
   * also while it runs. A write, `rollback()`, `commit()` and the end throw it away. Each gets a copy of the rows.
   * @throws what the read throws, and TypeError for a query that writes. SQLAlchemy: the identity map, for queries.
   */
  async remember<Row>(query: Compilable<Row> | CompiledQuery<Row>): Promise<Row[]> {
    const compiled = 'compile' in query ? query.compile() : query
    vouchFor(compiled)
    const scope = currentScope(this.#unit)
    const key = keyOf(compiled.sql, mapValues(compiled.parameters))
    const read = async () => (await this.executeQuery<Row>(compiled)).rows
    return scope.unit.remember(scope, this.#asks(key), read)
  }

  // The rows that plugins make of an answer are not those of a session without them.
  #asks(key: string): string {
    const names = this.#executor.plugins.map((plugin) => nameOf(plugin)).join()
    return `${names} ${key}`
  }

  /**
   * Calls `fn` once the commit is certain; never after a rollback, nor when it was registered in a nested transaction
   * that failed. Nobody waits for it, and what it throws is logged. Django: `on_commit`.
   */
  afterCommit(fn: Callback): void {
    const scope = currentScope(this.#unit)
    scope.unit.callAfter(scope, 'afterCommit', fn)
  }

  /** Calls `fn` after the session was rolled back; dropped with the nested transaction it was registered in. */
  afterRollback(fn: Callback): void {
    const scope = currentScope(this.#unit)
    scope.unit.callAfter(scope, 'afterRollback', fn)
  }

  /**
   * Hands the session's raw `pg` client to `fn`, for COPY, LISTEN or scripts of several statements, inside the session's
   * transaction. The session's own statements wait until `fn` is done. SQLAlchemy: `connection().connection`.
   */
  async withClient<T>(fn: (client: pg.Client) => Promise<T>): Promise<T> {
    const scope = currentScope(this.#unit)
    return scope.unit.withClient(scope, fn)
  }

  /** A nested transaction: a savepoint. What its callback does, also through this session, belongs to it. SQLAlchemy: `begin_nested()`. */
  override transaction(): TransactionBuilder<DB> {
    return new NestedTransactionBuilder<DB>(propsOf(this.#executor), this.#unit)
  }

  override withPlugin(plugin: KyselyPlugin): Session<DB> {
    return new Session<DB>(this.#unit, this.#executor.withPlugin(plugin))
  }

  override withoutPlugins(): Session<DB> {
    return new Session<DB>(this.#unit, this.#executor.withoutPlugins())
  }

  /** The same session, whose statements name the tables of that schema. */
  override withSchema(schema: string): Session<DB> {
    return new Session<DB>(this.#unit, this.#executor.withPluginAtFront(new WithSchemaPlugin(schema)))
  }

  override withTables<T extends Tables>(): Session<DB & T> {
    return new Session<DB & T>(this.#unit, this.#executor)
  }

  /** Ends nothing: the pool is the app's, and the session ends with its request. */
  override async destroy(): Promise<void> {}
}

// Kysely 0.29's names for the same session under other types; 0.28 has none to override.
for (const name of ['$extendTables', '$omitTables', '$pickTables']) {
  const value = Session.prototype.withTables
  Object.defineProperty(Session.prototype, name, { value, configurable: true, writable: true })
}

type Tables = Record<string, object>

const pluginNames = new WeakMap<KyselyPlugin, number>()
let named = 0

function nameOf(plugin: KyselyPlugin): number {
  const known = pluginNames.get(plugin) ?? ++named
  pluginNames.set(plugin, known)
  return known
}

interface NestedSettings {
  readonly isolationLevel?: KyselyIsolationLevel
  readonly accessMode?: 'read only' | 'read write'
}

class NestedTransactionBuilder<DB> extends TransactionBuilder<DB> {
  readonly #props: KyselyProps
  readonly #unit: UnitOfWork
  readonly #settings: NestedSettings

  constructor(props: KyselyProps, unit: UnitOfWork, settings: NestedSettings = {}) {
    super({ ...props, ...settings })
    this.#props = props
    this.#unit = unit
    this.#settings = settings
  }

  override setAccessMode(accessMode: 'read only' | 'read write'): TransactionBuilder<DB> {
    return new NestedTransactionBuilder<DB>(this.#props, this.#unit, { ...this.#settings, accessMode })
  }

  override setIsolationLevel(isolationLevel: KyselyIsolationLevel): TransactionBuilder<DB> {
    return new NestedTransactionBuilder<DB>(this.#props, this.#unit, { ...this.#settings, isolationLevel })
  }

  override execute<T>(callback: (trx: Transaction<DB>) => Promise<T>): Promise<T> {
    return nest(this.#unit, () => super.execute(callback))
  }
}

/** Makes a session on a unit of work. @internal */
export function makeSession<DB>(unit: UnitOfWork, begin: BeginOptions, plugins: readonly KyselyPlugin[]): Session<DB> {
  const provider: ConnectionProvider = { provideConnection: (consumer) => consumer(new SessionConnection(unit, begin)) }
  return new Session<DB>(unit, new SessionExecutor(new SessionConnection(unit, begin), provider, [...plugins]))
}
