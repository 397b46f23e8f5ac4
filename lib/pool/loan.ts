import type { RequestDbError } from '../errors.ts'
import type { Connection } from './connection.ts'
import type { Holding, Party } from './ledger.ts'
import type { Waiter } from './queue.ts'

/** Who wants a connection. After `checkOut` exactly one of `granted` and `refused` is called, unless it cancels. */
export interface Borrower extends Party {
  /** It needs the connection to COMMIT what may have been acknowledged: it is served while the pool closes. */
  readonly isEnding: boolean
  /** It can make do with a connection whose last session waits for the answer to its COMMIT or ROLLBACK: `isBehind`. */
  readonly canFollow: boolean
  granted(loan: Loan): void
  refused(error: RequestDbError): void
  /** The last session's COMMIT or ROLLBACK has been answered. */
  caughtUp(): void
  /** The last session's COMMIT or ROLLBACK is still unanswered, and your time to wait is over. */
  overdue(reason: () => RequestDbError): void
  /** The connection died in your hands. The loan is over; `again` makes a check-out that keeps its place. */
  lost(death: Error, again: () => CheckOut): void
  /** The pool closes and cannot wait for you any longer. */
  evict(reason: RequestDbError): void
}

/** What a loan tells its lender. */
export interface Lender {
  /** The borrower has sent its COMMIT or ROLLBACK: the connection may be handed over to somebody who follows. */
  offered(loan: Loan): void
  /** What it sent last, before it was handed over, has been answered, and nothing is left open. */
  answered(loan: Loan): void
  caughtUp(loan: Loan): void
  checkedIn(loan: Loan): void
}

/** The loan of a connection, from check-out to check-in or hand-over: the connection lives longer. */
export class Loan {
  readonly connection: Connection
  readonly checkOut: CheckOut
  readonly holding: Holding
  /** What other sessions have left on the connection has to be discarded before anything else. */
  readonly needsReset: boolean
  readonly #lender: Lender
  #isBehind: boolean
  #isOffered = false
  #isOver = false

  constructor(connection: Connection, checkOut: CheckOut, holding: Holding, lender: Lender) {
    this.connection = connection
    this.checkOut = checkOut
    this.holding = holding
    this.#lender = lender
    this.#isBehind = !connection.quiet
    this.needsReset = connection.isDirty
  }

  get borrower(): Borrower {
    return this.checkOut.borrower
  }

  /** The session before has handed the connection over and is not answered yet: what is sent now comes after that. */
  get isBehind(): boolean {
    return this.#isBehind
  }

  /** The connection is somebody else's, or nobody's. */
  get isOver(): boolean {
    return this.#isOver
  }

  /** COMMIT or ROLLBACK is on the wire: the connection is for whoever waits for one. One at a time waits behind another. */
  offer(): void {
    this.#isOffered = true
    if (!this.#isBehind && !this.#isOver) this.#lender.offered(this)
  }

  /** To be called after a hand-over: whoever has the connection now is no longer behind. */
  answered(): void {
    this.#lender.answered(this)
  }

  /** The session before has been answered. */
  caughtUp(): void {
    if (!this.#isBehind) return
    this.#isBehind = false
    this.#lender.caughtUp(this)
    this.borrower.caughtUp()
    if (this.#isOffered && !this.#isOver) this.#lender.offered(this)
  }

  /** The connection is another's from now on, or dead. */
  end(): void {
    this.#isOver = true
  }

  /** Gives the connection back. Safe to call twice. What state it is in is for the pool to find out. */
  checkIn(): void {
    if (this.#isOver) return
    this.#isOver = true
    this.#lender.checkedIn(this)
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
