import { Kysely } from 'kysely'
import { checkSessionOptions } from './check-options.ts'
import type { Engine } from './engine.ts'
import { type RequestDbError, Unavailable } from './errors.ts'
import { runJob } from './job.ts'
import type { ObservedPool, Snapshot, Who } from './observe/snapshot.ts'
import type { EffectiveRouteOptions, SessionOptions } from './options.ts'
import { callingOrigin } from './pool/ledger.ts'
import type { Loan } from './pool/loan.ts'
import { now } from './pool/queue.ts'
import { type BeginOptions, beginStatement, ownSettings, routeSettings, settingsStep } from './session/begin.ts'
import { SessionConnection } from './session/driver.ts'
import { executorOf, makeSession, propsOf, type Session } from './session/session.ts'
import { type UnitHost, UnitOfWork } from './session/transaction.ts'

// All of them, so that none is taken from Object.prototype.
const PLAIN: BeginOptions = { isolationLevel: undefined, readOnly: false, deferrable: false }

const engines = new WeakMap<object, Engine>()

/** What is behind a `fastify.db`; undefined for anything else. */
export const engineOf = (database: object): Engine | undefined => engines.get(database)

/** `fastify.db`: the pool of this process, and sessions outside of a request. */
export class Database<DB> {
  /**
   * Kysely for statements that need no session: each takes a connection, runs on its own and gives it back;
   * `transaction()` is a transaction on one connection, `connection()` keeps one for all of its function. SQLAlchemy:
   * `engine.connect()` with AUTOCOMMIT.
   */
  readonly kysely: Kysely<DB>
  readonly #engine: Engine

  /** Made by the plugin. @internal */
  constructor(engine: Engine) {
    this.#engine = engine
    engines.set(this, engine)
    const { options } = engine
    const who: Who = { method: '', route: 'kysely', requestId: '' }
    const { route } = checkSessionOptions(options.route, { autocommit: true })
    const provideConnection = async <T>(consumer: (connection: SessionConnection) => Promise<T>): Promise<T> => {
      const unit = this.#unit(who, route)
      try {
        // Kysely's connection(fn) is for what a connection remembers: locks, roles, temporary tables.
        return await unit.held(() => consumer(new SessionConnection(unit, PLAIN)))
      } finally {
        await unit.settle('rollback', 'its statement has ended')
      }
    }
    this.kysely = new Kysely<DB>(propsOf(executorOf({ provideConnection }, options.plugins)))
  }

  /**
   * Runs `fn` in a session of its own, with the guarantees a request has: commits when `fn` resolves, rolls back when it
   * rejects. For jobs, scripts, and what must be kept although the request fails.
   * @throws whatever `fn` throws, what the pool and COMMIT can throw, RETRIES_EXHAUSTED, and the reason of `signal`, or a
   * `TimeoutError` after `deadlineMillis`: by then the connection is back. SQLAlchemy: `with Session.begin()`.
   */
  session<T>(fn: (session: Session<DB>) => Promise<T>): Promise<T>
  session<T>(options: SessionOptions, fn: (session: Session<DB>) => Promise<T>): Promise<T>
  async session<T>(
    first: SessionOptions | ((session: Session<DB>) => Promise<T>),
    second?: (session: Session<DB>) => Promise<T>,
  ): Promise<T> {
    const fn = (typeof first === 'function' ? first : second) as (session: Session<DB>) => Promise<T>
    const { route, options } = checkSessionOptions(this.#engine.options.route, typeof first === 'function' ? {} : first)
    const begin: BeginOptions = { ...route, readOnly: route.readOnly === true }
    const who: Who = { method: '', route: options.name ?? 'session', requestId: '' }
    const { retry } = route
    return runJob({
      name: this.#engine.pool.options.name,
      fn,
      make: () => {
        const unit = this.#unit(who, route, options.settings)
        return [unit, makeSession<DB>(unit, begin, this.#engine.options.plugins)]
      },
      retry,
      signal: options.signal,
      deadlineMillis: options.deadlineMillis,
      isFollowed: this.#engine.options.asyncContext,
      onRetry: (error, attempt) => {
        const what = `request-db: attempt ${attempt} of ${retry?.attempts} of ${who.route} failed, and is made again`
        this.#engine.log.info({ err: error }, what)
      },
    })
  }

  /** What events on `node:diagnostics_channel` bear as their `pool`. */
  get pool(): ObservedPool {
    return this.#engine.pool
  }

  /** The pool at this moment, as plain data. SQLAlchemy: `pool.status()`. */
  snapshot(): Snapshot {
    return this.#engine.pool.snapshot()
  }

  /** Takes a connection and has the server answer on it. Resolves with the round trip in milliseconds. @throws what a session's first statement throws. */
  ping(): Promise<number> {
    return new Promise((resolve, reject) => {
      const { name, prePing, settleTimeoutMillis } = this.#engine.pool.options
      const refused = (error: RequestDbError) => reject(error)
      const granted = (loan: Loan) => {
        const since = now()
        loan.connection.ping(prePing ? prePing.timeoutMillis : settleTimeoutMillis, (alive) => {
          loan.checkIn()
          if (alive) resolve(now() - since)
          else reject(new Unavailable(name, { cause: loan.connection.death }))
        })
      }
      const who = { method: '', route: 'ping', requestId: '' }
      const deaf = { caughtUp: () => {}, overdue: () => {}, lost: () => {}, evict: () => {} }
      this.#engine.pool.checkOut({
        who,
        log: this.#engine.log,
        origin: undefined,
        isEnding: false,
        canFollow: false,
        granted,
        refused,
        ...deaf,
      })
    })
  }

  #unit(who: Who, route: EffectiveRouteOptions, settings?: SessionOptions['settings']): UnitOfWork {
    const isReadOnly = route.readOnly === true
    const begin = route.autocommit ? undefined : beginStatement({ ...route, readOnly: isReadOnly })
    const host: UnitHost = {
      who,
      settings: () => settingsStep({ ...routeSettings(route, isReadOnly), ...(settings && ownSettings(settings)) }),
      maxSessionMillis: this.#engine.options.maxSessionMillis,
      isCommitCertain: false,
      log: this.#engine.log,
      origin: callingOrigin(),
      holdings: undefined,
      onFirstUse: () => {},
      onCut: () => {},
    }
    return new UnitOfWork(this.#engine.pool, host, begin)
  }
}
