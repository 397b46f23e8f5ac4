import type { RequestDbError } from '../errors.ts'
import type { Connection } from './connection.ts'
import type { Holding, Who } from './ledger.ts'
import type { Waiter } from './queue.ts'

/** Who wants a connection. After `checkOut` exactly one of `granted` and `refused` is called, unless it cancels. */
export interface Borrower {
  readonly who: Who
  /** It needs the connection to COMMIT what may have been acknowledged: it is served while the pool closes. */
  readonly isEnding: boolean
  granted(loan: Loan): void
  refused(error: RequestDbError): void
  /** The connection died in your hands. The loan is over. */
  lost(death: Error): void
  /** The pool closes and cannot wait for you any longer. */
  evict(reason: RequestDbError): void
}

/** The loan of a connection, from check-out to check-in: the connection lives longer. */
export class Loan {
  readonly connection: Connection
  readonly borrower: Borrower
  readonly holding: Holding
  readonly #onCheckIn: (loan: Loan) => void
  #over = false

  constructor(connection: Connection, borrower: Borrower, holding: Holding, onCheckIn: (loan: Loan) => void) {
    this.connection = connection
    this.borrower = borrower
    this.holding = holding
    this.#onCheckIn = onCheckIn
  }

  /** Gives the connection back. Safe to call twice. What state it is in is for the pool to find out. */
  checkIn(): void {
    if (this.#over) return
    this.#over = true
    this.#onCheckIn(this)
  }
}

/** What becomes of a check-out's place in the queue. */
export interface SlotListener {
  /** `left` is what the last owner of the slot left in it. */
  slotGranted(checkOut: CheckOut, left: Connection | undefined): void
  slotRefused(checkOut: CheckOut, why: 'timeout' | 'saturated' | 'closed'): void
}

/** A check-out under way: in the queue, opening a connection, or asking an idle one whether it is alive. */
export class CheckOut implements Waiter<Connection> {
  readonly borrower: Borrower
  /** Nobody waits for its outcome any more: it was cancelled, or the borrower has been told. */
  over = false
  readonly #listener: SlotListener

  constructor(borrower: Borrower, listener: SlotListener) {
    this.borrower = borrower
    this.#listener = listener
  }

  granted(left: Connection | undefined): void {
    this.#listener.slotGranted(this, left)
  }

  refused(why: 'timeout' | 'saturated' | 'closed'): void {
    this.#listener.slotRefused(this, why)
  }
}
