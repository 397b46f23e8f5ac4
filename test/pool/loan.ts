import t from 'tap'
import type { Connection } from '../../lib/pool/connection.ts'
import { Ledger } from '../../lib/pool/ledger.ts'
import { type Borrower, CheckOut, Loan } from '../../lib/pool/loan.ts'

const WHO = { method: 'GET', route: '/', requestId: '1' }
const borrower: Borrower = {
  who: WHO,
  isEnding: false,
  granted: () => {},
  refused: () => {},
  lost: () => {},
  evict: () => {},
}
const connection = { pid: 1 } as Connection

t.test('a loan is given back once, however often it is tried', async (t) => {
  const given: Loan[] = []
  const holding = new Ledger().checkedOut(WHO, 1)
  const loan = new Loan(connection, borrower, holding, (back) => given.push(back))
  t.match(loan, { connection, borrower, holding })
  loan.checkIn()
  loan.checkIn()
  t.strictSame(given, [loan])
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
