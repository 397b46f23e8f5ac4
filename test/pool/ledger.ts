import t from 'tap'
import { takeClock } from '../support/clock.ts'
import { openLedger, partyOf } from '../support/ledger.ts'

const WHO = { method: 'GET', route: '/trips/:id', requestId: 'req-1' }
const PARTY = partyOf(WHO)

t.test('a holder is listed from check-out to check-in, with its times and statements', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  const holding = ledger.checkedOut({}, PARTY, 4711, false)
  t.match(ledger.holders(), [{ ...WHO, pid: 4711, statements: 0, lastStatement: undefined, inTransaction: false }])
  clock.advance(100)
  holding.busy(1, 'select 1')
  clock.advance(30)
  const [busy] = ledger.holders()
  t.match(busy, { statements: 1, lastStatement: 'select 1' })
  near(t, busy!.heldMillis, 130)
  near(t, busy!.busyMillis, 30)
  near(t, busy!.idleMillis, 100)
  holding.idle()
  clock.advance(1000)
  const [idle] = ledger.holders()
  near(t, idle!.heldMillis, 1130)
  near(t, idle!.busyMillis, 30)
  near(t, idle!.idleMillis, 1100)
  ledger.checkedIn(holding, false)
  t.strictSame(ledger.holders(), [])
  t.equal(ledger.totals.checkouts, 1)
})

t.test('statements that overlap count as one busy time', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  const holding = ledger.checkedOut({}, PARTY, 1, false)
  holding.busy(2, 'select 2')
  clock.advance(10)
  holding.busy(1, 'select 3')
  clock.advance(10)
  holding.idle()
  clock.advance(50)
  holding.busy(1, 'select 4')
  clock.advance(5)
  holding.idle()
  const [held] = ledger.holders()
  near(t, held!.busyMillis, 25)
  t.match(held, { statements: 4, lastStatement: 'select 4' })
})

t.test('commands of the plugin make busy, but are no statements of the app', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  const holding = ledger.checkedOut({}, PARTY, 1, false)
  holding.busy(1, 'select 1')
  holding.idle()
  holding.busy(0, '')
  clock.advance(20)
  t.match(ledger.holders(), [{ statements: 1, lastStatement: 'select 1' }])
  near(t, ledger.holders()[0]!.busyMillis, 20)
})

t.test('idle() without anything under way adds nothing', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  const holding = ledger.checkedOut({}, PARTY, 1, false)
  clock.advance(500)
  holding.idle()
  holding.idle()
  near(t, ledger.holders()[0]!.busyMillis, 0)
  near(t, ledger.holders()[0]!.idleMillis, 500)
})

t.test('a waiter is listed until it waits no more', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  const [a, b] = [{}, {}]
  ledger.waits(a, PARTY)
  clock.advance(40)
  ledger.waits(b, partyOf({ ...WHO, requestId: 'req-2' }))
  clock.advance(2)
  t.match(ledger.waiters(), [WHO, { requestId: 'req-2' }])
  near(t, ledger.waiters()[0]!.waitedMillis, 42)
  near(t, ledger.waiters()[1]!.waitedMillis, 2)
  ledger.waitsNoMore(a, 'left')
  ledger.waitsNoMore(a, 'left')
  t.match(ledger.waiters().length, 1)
  ledger.waitsNoMore(b, 'left')
  t.strictSame(ledger.waiters(), [])
})

t.test('what it hands out is a copy', async (t) => {
  const ledger = openLedger()
  const holding = ledger.checkedOut({}, PARTY, 1, false)
  const before = ledger.holders()
  holding.busy(1, 'select 1')
  t.equal(before[0]!.statements, 0)
  t.doesNotThrow(() => JSON.stringify(before))
})

t.test('the time to come back is that of the queue at the pace of late, from 1 to 60 seconds', async (t) => {
  const clock = takeClock(t)
  const ledger = openLedger()
  t.equal(ledger.retryAfterSeconds(50), 1, 'nothing is known yet')
  const serve = (everyMillis: number, times: number) => {
    for (let i = 0; i < times; i++) {
      const holding = ledger.checkedOut({}, PARTY, 1, false)
      clock.advance(everyMillis)
      ledger.checkedIn(holding, false)
    }
  }
  serve(100, 50)
  t.equal(ledger.retryAfterSeconds(50), 6, '50 waiters, a tenth of a second each, and what the machine takes')
  t.equal(ledger.retryAfterSeconds(0), 1)
  t.equal(ledger.retryAfterSeconds(100_000), 60)
  serve(1000, 50)
  const slow = ledger.retryAfterSeconds(10)
  t.ok(slow >= 9 && slow <= 11, `it follows the pace: ${slow}`)
})

function near(t: { ok(value: boolean, message: string): void }, found: number, wanted: number): void {
  t.ok(found >= wanted && found < wanted + 60, `${found} ms is about ${wanted} ms`)
}
