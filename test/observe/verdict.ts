import { diagnose } from '../../lib/observe/verdict.ts'
import { backend, facts, holder, use, waiter } from '../support/facts.ts'
import { test } from '../support/test.ts'

/* The order of the causes, and where each begins. That they are found on a real server is in causes.ts. */

const four = (route: string, more = {}) => Array.from({ length: 4 }, () => holder(route, more))
const busy = { heldMillis: 2000, busyMillis: 1900, state: 'busy', stateMillis: 1900 } as const
const coded = (code: string, message = 'no') => Object.assign(new Error(message), { code })

test('of causes that overlap, the one that makes the others is the verdict', async (t) => {
  const leaked = four('/leak', { answeredMillis: 5000, heldMillis: 6000 })
  const blocked = four('/blocked', busy)
  const holders = [...leaked.slice(0, 2), ...blocked.slice(0, 2)]
  const server = { backends: [...blocked.map(({ pid }) => backend(pid, [999])), backend(999)], error: undefined }
  const second = waiter('session', { requestId: '', openedBy: { method: 'GET', route: '/audit', requestId: 'r' } })
  const waiters = [{ ...second, holds: [leaked[0]!.pid] }]
  const recent = { routes: [use('/slow', 10, 900, 800)], refused: 3, millis: 10_000 }

  const all = facts({ holders, waiters }, { server, recent, cause: coded('53300') })
  t.equal(diagnose({ ...all, cause: coded('ECONNREFUSED') })?.cause, 'unreachable')
  t.equal(diagnose(all)?.cause, 'server-full')
  t.equal(diagnose({ ...all, cause: undefined })?.cause, 'hold-and-wait')
  t.equal(diagnose(facts({ holders }, { server, recent }))?.cause, 'leak')
  t.equal(diagnose(facts({ holders: blocked }, { server, recent }))?.cause, 'lock-wait')
  t.equal(diagnose(facts({ holders: blocked }, { recent }))?.cause, 'slow-sql')
  t.equal(diagnose(facts({ holders: four('/idle') }))?.cause, 'held-idle')
  const short = { routes: [use('/quick', 500, 20, 19)], refused: 3, millis: 10_000 }
  t.equal(diagnose(facts({}, { recent: short }))?.cause, 'pool-too-small')
  t.equal(diagnose(facts({}, { code: 'FST_REQUEST_DB_POOL_CLOSED', cause: coded('ECONNREFUSED') })), undefined)
})

test('a failure to connect is to blame only while the pool is not full, and while it is recent', async (t) => {
  const failedConnect = { error: coded('ECONNREFUSED'), agoMillis: 500 }
  const holders = four('/idle')
  t.equal(diagnose(facts({ holders, open: 3 }, { failedConnect }))?.cause, 'unreachable')
  t.equal(diagnose(facts({ holders }, { failedConnect }))?.cause, 'held-idle', 'there are as many as there may be')
  const old = { ...failedConnect, agoMillis: 60_000 }
  t.equal(diagnose(facts({ holders, open: 3 }, { failedConnect: old }))?.cause, 'held-idle')
})

test('a leak needs a quarter of the connections, and silence', async (t) => {
  const leaked = (count: number) => Array.from({ length: count }, () => holder('/leak', { answeredMillis: 5000 }))
  const rest = (count: number) => Array.from({ length: count }, () => holder('/slow', busy))
  t.equal(diagnose(facts({ holders: [...leaked(1), ...rest(3)] }))?.cause, 'leak')
  const eight = facts({ holders: [...leaked(1), ...rest(7)] })
  t.equal(
    diagnose({ ...eight, snapshot: { ...eight.snapshot, size: 8 } })?.cause,
    'slow-sql',
    'one of eight is not why',
  )
  const working = four('/export', { ...busy, answeredMillis: 5000 })
  t.equal(diagnose(facts({ holders: working }))?.cause, 'slow-sql', 'a stream that is still read is none')
  const settling = four('/idle', { answeredMillis: 20 })
  t.equal(diagnose(facts({ holders: settling }))?.cause, 'held-idle', 'the response has just left')
})

test('who is held for long is leaked only when nothing of its route comes back', async (t) => {
  const holders = four('/report', { heldMillis: 5000 })
  t.equal(diagnose(facts({ holders }))?.cause, 'leak', 'after three times the timeout')
  const recent = { routes: [use('/report', 5, 4000, 10)], refused: 0, millis: 10_000 }
  t.equal(diagnose(facts({ holders }, { recent }))?.cause, 'held-idle')
  t.equal(
    diagnose(facts({ holders }, { leakDetectionMillis: 10_000 }))?.cause,
    'held-idle',
    'that limit is not reached',
  )
})

test('of a chain of locks, the one at its end is named, and whoever is ours by its route', async (t) => {
  const first = holder('/import', { heldMillis: 9000 })
  const [second, third] = [holder('/middle', busy), holder('/end', busy)]
  const backends = [backend(first.pid), backend(second.pid, [first.pid]), backend(third.pid, [second.pid])]
  const verdict = diagnose(facts({ holders: [third, second, first] }, { server: { backends, error: undefined } }))
  t.match(verdict, { cause: 'lock-wait', routes: ['GET /import'] })
  t.match(verdict?.sentence, /held by GET \/import, backend \d+, idle in transaction for 5\.0 s\./)
})

test('who waits with no connection of its own is no hold-and-wait, whoever else holds one', async (t) => {
  const waiters = Array.from({ length: 6 }, () => waiter('job', { requestId: '', method: '' }))
  const working = four('/quick', { heldMillis: 30, stateMillis: 5 })
  t.equal(diagnose(facts({ holders: working, waiters }))?.cause, 'held-idle', 'their holders still do something')
  const silent = four('/audit', { heldMillis: 1100, stateMillis: 1050 })
  t.equal(diagnose(facts({ holders: silent, waiters }))?.cause, 'hold-and-wait', 'all are silent since others wait')
})

test('the size that would do is Little’s, unless the server has no room for it', async (t) => {
  const recent = { routes: [use('/quick', 5000, 20, 19)], refused: 5000, millis: 10_000 }
  const enough = diagnose(facts({}, { recent }))
  const { neededConnections } = enough!.evidence as { neededConnections: number }
  t.ok(neededConnections >= 20 && neededConnections <= 30, `${neededConnections} for 20 in use at once`)
  t.match(enough?.sentence, new RegExp(`Size and overflow of ${neededConnections} in all would do`))
  const capacity = { maxConnections: 20, reserved: 3, ours: 4, others: 7 }
  t.match(diagnose(facts({}, { recent, capacity }))?.sentence, /the server has room for 10 a process/)
})

test('many statements of little time each are told as what they are', async (t) => {
  const recent = { routes: [{ ...use('/list', 10, 800, 700), statements: 10 * 300 }], refused: 1, millis: 10_000 }
  t.match(diagnose(facts({}, { recent })), { cause: 'slow-sql', sentence: /Each sends 300 statements: send fewer/ })
})
