import type { FastifyInstance } from 'fastify'
import { type Database, engineOf } from './database.ts'
import type { Engine } from './engine.ts'
import { InvalidOption } from './errors.ts'
import { trackFully } from './observe/origin.ts'
import type { Who } from './observe/snapshot.ts'
import type { IsolationLevel } from './options.ts'
import { Notebook } from './testing/notebook.ts'
import { TestPool } from './testing/test-pool.ts'

const WITHIN_MILLIS = 1000

/** What `beginTest` and `watchSessions` take. */
export interface TestOptions {
  /** The registration's `decorator`. Default `'db'`. */
  decorator?: string | undefined
}

/** What `beginTest` takes. */
export interface BeginTestOptions extends TestOptions {
  /** Of the outer transaction, and so of all sessions in it. Default: the server's, normally read committed. */
  isolationLevel?: IsolationLevel | undefined
}

/** A callback of `afterCommit` that is due: in production it would be called now. */
export interface CapturedCallback {
  /** The method and route of the request that registered it; for `fastify.db.session`, no method and its name. */
  readonly method: string
  /** See `method`. */
  readonly route: string
  /** Calls it. */
  run(): unknown
}

/** Looks at how sessions end. */
export interface SessionWatch {
  /**
   * Resolves when every session is over and has left nothing behind. Sessions that are ending have `withinMillis` for it,
   * by default 1000. @throws Error that names the routes, and what they have left: a connection, a transaction, a statement
   * that nobody awaited
   */
  assertNothingLeft(withinMillis?: number): Promise<void>
}

/** A transaction around the sessions of a test. SQLAlchemy: `join_transaction_mode="create_savepoint"`; Django: `TestCase`. */
export interface TestTransaction extends SessionWatch {
  /** What was registered with `afterCommit` by sessions that were committed, in this order, and not called yet. */
  readonly callbacks: readonly CapturedCallback[]
  /** Calls what is due, one after the other, also what becomes due meanwhile. @throws what they throw. */
  runCallbacks(): Promise<void>
  /** Undoes all that was done since `beginTest`, and gives the app its own pool back. Safe to call twice. */
  rollback(): Promise<void>
}

/**
 * Puts all sessions of an app into one transaction on one connection, until `rollback()`: COMMIT is the release of a
 * savepoint, so that what one request writes the next one reads, and nobody else ever. Sessions take turns.
 * @throws INVALID_OPTION, and what a first statement can throw
 */
export async function beginTest(
  app: FastifyInstance,
  { decorator = 'db', isolationLevel }: BeginTestOptions = {},
): Promise<TestTransaction> {
  await app.ready()
  const { database, engine } = behind(app, decorator)
  if (engine.pool instanceof TestPool) {
    throw new InvalidOption(
      'decorator',
      'a registration without a test, whose rollback() comes first',
      `'${decorator}'`,
    )
  }
  // So that a session inside another one is known for what it is.
  trackFully()
  const pool = new TestPool(engine.options.pool, engine.log, isolationLevel)
  const notebook = new Notebook(pool)
  const callbacks: CapturedCallback[] = []
  const due = ({ method, route }: Who, run: () => unknown) => callbacks.push({ method, route, run })
  pool.inspector = { ends: notebook.ends, due }
  engine.pool = pool
  try {
    await database.ping()
  } catch (error) {
    engine.restore()
    await pool.close()
    throw error
  }
  return {
    callbacks,
    async runCallbacks() {
      for (let next = callbacks.shift(); next !== undefined; next = callbacks.shift()) await next.run()
    },
    assertNothingLeft: (withinMillis = WITHIN_MILLIS) => notebook.assertClean(withinMillis),
    async rollback() {
      if (engine.pool !== pool) return
      engine.restore()
      await pool.rollBack()
    },
  }
}

/**
 * Only looks at how the sessions of an app end, in transactions of their own, from now on.
 * @throws INVALID_OPTION
 */
export function watchSessions(app: FastifyInstance, { decorator = 'db' }: TestOptions = {}): SessionWatch {
  const { pool } = behind(app, decorator).engine
  const notebook = new Notebook(pool)
  pool.inspector = { ends: notebook.ends }
  return { assertNothingLeft: (withinMillis = WITHIN_MILLIS) => notebook.assertClean(withinMillis) }
}

function behind(app: FastifyInstance, decorator: string): { database: Database<unknown>; engine: Engine } {
  const database = (app as unknown as Record<string, Database<unknown> | undefined>)[decorator]
  const engine = database && engineOf(database)
  if (database && engine) return { database, engine }
  throw new InvalidOption('decorator', 'the `decorator` of a fastify-request-db on this instance', `'${decorator}'`)
}
