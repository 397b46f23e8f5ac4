import t from 'tap'
import type { Connection } from '../../lib/pool/connection.ts'
import { type Borrower, CheckOut, Loan } from '../../lib/pool/loan.ts'
import { deafLog, openLedger, partyOf } from '../support/ledger.ts'

const WHO = { method: 'GET', route: '/', requestId: '1' }
const borrower: Borrower = {
  who: WHO,
  log: deafLog,
  origin: undefined,
  isEnding: false,
  canFollow: false,
  granted: () => {},
  refused: () => {},
  caughtUp: () => {},
  overdue: () => {},
  lost: () => {},
  evict: () => {},
}
const connection = { pid: 1, quiet: true } as Connection

const listener = { slotGranted: () => {}, slotRefused: () => {} }

/** A loan of `lent`, and what its lender is told. */
function lend(lent: Connection) {
  const told: string[] = []
  const holding = openLedger().checkedOut({}, partyOf(WHO), 1, false)
  const lender = {
    offered: () => told.push('offered'),
    answered: () => told.push('answered'),
    caughtUp: () => told.push('caught up'),
    checkedIn: () => told.push('checked in'),
  }
  return { told, loan: new Loan(lent, new CheckOut(borrower, listener), holding, lender) }
}

t.test('a loan is given back once, however often it is tried', async (t) => {
  const { loan, told } = lend(connection)
  t.match(loan, { connection, borrower, isBehind: false, isOver: false })
  loan.checkIn()
  loan.checkIn()
  t.strictSame(told, ['checked in'])
  t.equal(loan.isOver, true)
})

t.test('a loan that was handed over is not given back', async (t) => {
  const { loan, told } = lend(connection)
  loan.offer()
  loan.end()
  loan.checkIn()
  loan.offer()
  loan.answered()
  t.strictSame(told, ['offered', 'answered'])
})

t.test('a loan behind another is offered once that is answered', async (t) => {
  const { loan, told } = lend({ pid: 1, quiet: false } as Connection)
  t.equal(loan.isBehind, true)
  loan.offer()
  t.strictSame(told, [])
  loan.caughtUp()
  loan.caughtUp()
  t.strictSame(told, ['caught up', 'offered'])
  t.equal(loan.isBehind, false)
})

t.test('a loan that is over is not offered when it catches up', async (t) => {
  const { loan, told } = lend({ pid: 1, quiet: false } as Connection)
  loan.offer()
  loan.checkIn()
  loan.caughtUp()
  t.strictSame(told, ['checked in', 'caught up'])
})

t.test('a check-out hands on what becomes of its place in the queue', async (t) => {
  const told: unknown[][] = []
  const checkOut = new CheckOut(borrower, {
    slotGranted: (...args) => told.push(args),
    slotRefused: (...args) => told.push(args),
  })
  t.equal(checkOut.over, false)
  checkOut.granted(connection)
  checkOut.granted(undefined)
  checkOut.refused('timeout')
  t.equal(told.length, 3)
  t.ok(told.every(([one]) => one === checkOut))
  t.strictSame(
    told.map(([, what]) => what),
    [connection, undefined, 'timeout'],
  )
})
