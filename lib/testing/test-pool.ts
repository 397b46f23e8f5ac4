import type { FastifyBaseLogger } from 'fastify'
import { NestedConflict } from '../errors.ts'
import type { EffectivePoolOptions, IsolationLevel } from '../options.ts'
import type { Connection } from '../pool/connection.ts'
import { type Borrower, CheckOut } from '../pool/loan.ts'
import { Pool } from '../pool/pool.ts'
import { beginStatement } from '../session/begin.ts'
import { OuterConnection } from './outer-connection.ts'

const LONGEST_WAIT_MILLIS = 5000
const LOST = 'The transaction of the test was lost with its connection, and all that was in it: begin a new one'

/** A pool of one connection, which is in one transaction from the first session to the last. */
export class TestPool extends Pool {
  readonly #isolationLevel: IsolationLevel | undefined
  #connection: OuterConnection | undefined

  constructor(options: EffectivePoolOptions, log: FastifyBaseLogger, isolationLevel: IsolationLevel | undefined) {
    super(only(options), log)
    this.#isolationLevel = isolationLevel
  }

  /** A session that is opened inside one which has the connection would wait for itself. */
  override checkOut(borrower: Borrower): CheckOut {
    const [around] = this.ledger.heldBy(borrower)
    if (around === undefined) return super.checkOut(borrower)
    const { method, route } = around.who
    const checkOut = new CheckOut(borrower, { slotGranted: () => {}, slotRefused: () => {} })
    checkOut.over = true
    borrower.refused(
      new NestedConflict(
        `${method} ${route} opens a session while its own has the only connection of the test's transaction. ` +
          'In production it would take a second connection: commit() first, or open it before the first statement',
      ),
    )
    return checkOut
  }

  /** Undoes everything. */
  async rollBack(): Promise<void> {
    const connection = this.#connection
    if (connection?.death === undefined) await connection?.sendOuter('ROLLBACK', this.options.settleTimeoutMillis)
    await this.close()
  }

  protected override openConnection(...how: Parameters<typeof Connection.open>): () => void {
    const [config, names, , done] = how
    if (this.#connection !== undefined) {
      setImmediate(done, new Error(LOST))
      return () => {}
    }
    return OuterConnection.open(config, names, Number.POSITIVE_INFINITY, (error, opened) => {
      if (opened === undefined) {
        done(error)
        return
      }
      const connection = opened as OuterConnection
      this.#connection = connection
      const begin = beginStatement({ isolationLevel: this.#isolationLevel })
      connection.sendOuter(begin, this.options.settleTimeoutMillis).then(() => done(undefined, connection), done)
    })
  }
}

function only(options: EffectivePoolOptions): EffectivePoolOptions {
  const { connection, timeoutMillis } = options
  return {
    ...options,
    connection,
    size: 1,
    maxOverflow: 0,
    timeoutMillis: Math.min(timeoutMillis || LONGEST_WAIT_MILLIS, LONGEST_WAIT_MILLIS),
    recycleMillis: Number.POSITIVE_INFINITY,
    prePing: false,
    resetOnReturn: 'rollback',
    preparedStatements: false,
    capacityCheck: false,
  }
}
