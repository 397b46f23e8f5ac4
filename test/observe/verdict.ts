import { diagnose } from '../../lib/observe/verdict.ts'
import { backend, facts, holder, lately, use, waiter } from '../support/facts.ts'
import { test } from '../support/test.ts'

/* The order of the causes, and where each begins. That they are found on a real server is in causes.ts. */

const four = (route: string, more = {}) => Array.from({ length: 4 }, () => holder(route, more))
const busy = { heldMillis: 2000, busyMillis: 1900, state: 'busy', stateMillis: 1900 } as const
const coded = (code: string, message = 'no') => Object.assign(new Error(message), { code })

test('of causes that overlap, the one that makes the others is the verdict', async (t) => {
  const leaked = four('/leak', { answeredMillis: 5000, heldMillis: 6000 })
  const blocked = four('/blocked', busy)
  const holders = [...leaked.slice(0, 2), ...blocked.slice(0, 2)]
  const server = {
    backends: [...blocked.map(({ pid }) => backend(pid, [999])), backend(999)],
    holders: [],
    error: undefined,
    agoMillis: 500,
  }
  const second = waiter('session', { requestId: '', openedBy: { method: 'GET', route: '/audit', requestId: 'r' } })
  const waiters = [{ ...second, holds: [leaked[0]!.pid] }]
  const recent = lately([use('/slow', 10, 900, 800)], 3)

  const all = facts({ holders, waiters }, { server, recent, cause: coded('53300') })
  t.equal(diagnose({ ...all, cause: coded('ECONNREFUSED') })?.cause, 'unreachable')
  t.equal(diagnose(all)?.cause, 'server-full')
  t.equal(diagnose({ ...all, cause: undefined })?.cause, 'hold-and-wait')
  t.equal(diagnose(facts({ holders }, { server, recent }))?.cause, 'leak')
  t.equal(diagnose(facts({ holders: blocked }, { server, recent }))?.cause, 'lock-wait')
  t.equal(diagnose(facts({ holders: blocked }, { recent }))?.cause, 'slow-sql')
  t.equal(diagnose(facts({ holders: four('/idle') }))?.cause, 'held-idle')
  const short = lately([use('/quick', 500, 20, 19)], 3)
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
  const leaked = (count: number) =>
    Array.from({ length: count }, () => holder('/leak', { answeredMillis: 5000, heldMillis: 6000 }))
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
  const holders = four('/report', { heldMillis: 6000 })
  t.equal(diagnose(facts({ holders }))?.cause, 'leak', 'after five times the timeout')
  const recent = lately([use('/report', 5, 4000, 10)], 0)
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
  const verdict = diagnose(
    facts({ holders: [third, second, first] }, { server: { backends, holders: [], error: undefined, agoMillis: 500 } }),
  )
  t.match(verdict, { cause: 'lock-wait', routes: ['GET /import'] })
  t.match(verdict?.sentence, /held by GET \/import, backend \d+, idle in transaction for 5\.5 s\./)
})

test('who waits with no connection of its own is no hold-and-wait, whoever else holds one', async (t) => {
  const waiters = Array.from({ length: 6 }, () => waiter('job', { requestId: '', method: '' }))
  const working = four('/quick', { heldMillis: 30, stateMillis: 5 })
  t.equal(diagnose(facts({ holders: working, waiters }))?.cause, 'held-idle', 'their holders still do something')
  const silent = four('/audit', { heldMillis: 1100, stateMillis: 1050 })
  t.equal(diagnose(facts({ holders: silent, waiters }))?.cause, 'hold-and-wait', 'all are silent since others wait')
})

test('the size that would do is Little’s, unless the server has no room for it', async (t) => {
  const recent = lately([use('/quick', 5000, 20, 19)], 5000)
  const enough = diagnose(facts({}, { recent }))
  const { neededConnections } = enough!.evidence as { neededConnections: number }
  t.ok(neededConnections >= 20 && neededConnections <= 30, `${neededConnections} for 20 in use at once`)
  t.match(enough?.sentence, new RegExp(`Size and overflow of ${neededConnections} in all would do`))
  const capacity = { maxConnections: 20, reserved: 3, ours: 4, others: 7 }
  t.match(diagnose(facts({}, { recent, capacity }))?.sentence, /the server has room for 10 a process/)
})

test('many statements of little time each are told as what they are', async (t) => {
  const recent = lately([{ ...use('/list', 10, 800, 700), statements: 10 * 300 }], 1)
  t.match(diagnose(facts({}, { recent })), { cause: 'slow-sql', sentence: /Each sends 300 statements: send fewer/ })
})

test('a question to the server that was not answered counts only while nothing else is answered', async (t) => {
  const server = {
    backends: [],
    holders: [],
    error: new Error('No answer within 1000 ms'),
    agoMillis: 1500,
  }
  const holders = four('/slow', busy)
  t.equal(diagnose(facts({ holders }, { server, answeredMillis: 1600 }))?.cause, 'unreachable')
  t.equal(diagnose(facts({ holders }, { server, answeredMillis: 10 }))?.cause, 'slow-sql')
  const full = { ...server, error: coded('53300') }
  t.equal(
    diagnose(facts({ holders }, { server: full, answeredMillis: 1600 }))?.cause,
    'slow-sql',
    'it had no room for it',
  )
})

test('what the server said is of those who were there then', async (t) => {
  const holders = four('/v', { heldMillis: 700, busyMillis: 700, state: 'busy', stateMillis: 700 })
  const backends = [...holders.map(({ pid }) => backend(pid, [999])), backend(999)]
  const verdictAt = (agoMillis: number) =>
    diagnose(facts({ holders }, { server: { backends, holders, error: undefined, agoMillis } }))?.cause
  t.equal(verdictAt(500), 'lock-wait')
  t.equal(verdictAt(5000), 'slow-sql', 'the same backends serve others by now')
})

test('where many wait a little for one row, those who wait now are taken to do what the others did', async (t) => {
  const waiting = { heldMillis: 250, busyMillis: 250, state: 'busy', stateMillis: 250 } as const
  const [before, later] = [four('/hot', waiting), four('/hot', waiting)]
  const backends = [...before.map(({ pid }) => backend(pid, [999])), backend(999)]
  const server = { backends, holders: before, error: undefined, agoMillis: 800 }
  t.match(diagnose(facts({ holders: later }, { server })), { cause: 'lock-wait', routes: ['GET /hot'] })
  t.equal(diagnose(facts({ holders: later }, { server: { ...server, agoMillis: 9000 } }))?.cause, 'slow-sql')
  t.equal(diagnose(facts({ holders: four('/slow', waiting) }, { server }))?.cause, 'slow-sql', 'others are not')
})

test('few that hold for long are not hidden by many that are quick', async (t) => {
  const quick = use('/fast', 1000, 4, 4)
  const slow = facts({}, { recent: lately([quick, use('/slow', 10, 400, 390)]) })
  t.match(diagnose(slow), { cause: 'slow-sql', routes: ['GET /slow'], evidence: { meanBusyMillis: 390 } })
  const idle = facts({}, { recent: lately([quick, use('/idle', 10, 400, 10)]) })
  t.match(diagnose(idle), { cause: 'held-idle', routes: ['GET /idle'], evidence: { meanIdleMillis: 390 } })
  const waitedFor = facts(
    { holders: [...four('/stuck', busy).slice(0, 2)] },
    { recent: lately([use('/fast', 9000, 4, 4)]) },
  )
  t.match(diagnose(waitedFor), { cause: 'slow-sql', routes: ['GET /stuck'] }, 'whatever has come back meanwhile')
})

test('sessions that have only just begun make the others look no shorter', async (t) => {
  const begun = Array.from({ length: 4 }, () => holder('/slow', { heldMillis: 5, busyMillis: 5, state: 'busy' }))
  const verdict = diagnose(facts({ holders: begun }, { recent: lately([use('/slow', 3, 250, 240)]) }))
  t.match(verdict, { cause: 'slow-sql', evidence: { meanBusyMillis: 240 } })
})

test('a job that goes on after the response is no leak while it goes on', async (t) => {
  const working = four('session', { answeredMillis: 3000, heldMillis: 3000, stateMillis: 60 })
  t.equal(diagnose(facts({ holders: working }))?.cause, 'held-idle')
  const silent = four('session', { answeredMillis: 3000, heldMillis: 3000, stateMillis: 900 })
  t.equal(diagnose(facts({ holders: silent }))?.cause, 'leak')
})

test('a route that has been seen to take long and come back is not leaked before it takes twice that', async (t) => {
  const thinking = (heldMillis: number) => four('/think', { heldMillis })
  const recent = lately([], 3, { 'GET /think': 4000 })
  t.equal(diagnose(facts({ holders: thinking(5000) }, { recent }))?.cause, 'held-idle')
  t.equal(diagnose(facts({ holders: thinking(9000) }, { recent }))?.cause, 'leak')
})

test('a request that injects another one is the guilty one, and jobs are not taken for second sessions', async (t) => {
  const [outer] = four('/outer')
  const injected = waiter('/inner', { holds: [outer!.pid] })
  const verdict = diagnose(facts({ holders: [outer!], waiters: [injected] }))
  t.match(verdict, { cause: 'hold-and-wait', routes: ['GET /outer'] })
  t.match(verdict?.sentence, /GET \/outer holds a connection and waits for a second one, for GET \/inner: /)
  const silent = four('/think', { heldMillis: 1100, stateMillis: 1050 })
  const jobs = Array.from({ length: 4 }, () => waiter('job', { requestId: '', method: '' }))
  const followed = facts({ holders: silent, waiters: jobs }, { followed: new Set(silent.map(({ pid }) => pid)) })
  t.equal(diagnose(followed)?.cause, 'held-idle', 'it would be known of sessions that were opened in them')
})

test('a pool at its start, of which nobody has had a connection yet', async (t) => {
  const cold = facts({ open: 0 }, { connecting: [30, 20], recent: lately([], 5) })
  t.match(diagnose(cold), { cause: 'pool-too-small', routes: ['GET /victim'] })
  t.match(
    diagnose(cold)?.sentence,
    /2 connections are still being opened, since 30 ms, and more sessions ask than may wait/,
  )
  t.equal(diagnose({ ...cold, timeoutMillis: 0 })?.cause, 'pool-too-small', 'it has not been silent for long')
  t.equal(diagnose({ ...cold, connecting: [900, 900, 900, 900] })?.cause, 'unreachable')
})

test('the limits of a role and of a database are told from the server’s', async (t) => {
  const full = (routine: string) => diagnose(facts({}, { cause: Object.assign(coded('53300'), { routine }) }))
  t.match(full('CheckMyDatabase'), { cause: 'server-full', evidence: { limit: 'database', heldByOthers: undefined } })
  t.match(full('InitializeSessionUserId')?.sentence, /ALTER ROLE … CONNECTION LIMIT/)
  t.match(full('InitProcess')?.sentence, /raise max_connections/)
})
