import { makeReport, sentenceOf } from '../../lib/observe/report.ts'
import { facts, holder, waiter } from '../support/facts.ts'
import { test } from '../support/test.ts'

/* What a report says, and its one line for the log. */

test('holders and waiters are grouped by the route that is responsible, the largest group first', async (t) => {
  const openedBy = { method: 'POST', route: '/trips', requestId: 'req-0' }
  const report = makeReport(
    facts({
      holders: [
        holder('/a'),
        holder('/b', { heldMillis: 900, busyMillis: 300, lastStatement: 'select 2' }),
        holder('/b', { state: 'busy' }),
        holder('session', { method: '', requestId: '', openedBy }),
      ],
      waiters: [waiter('/a'), waiter('/a', { waitedMillis: 1500 }), waiter('/b')],
    }),
  )
  t.match(report.holders, [
    { method: 'GET', route: '/b', count: 2, busy: 1, oldestMillis: 900, busyMillis: 300, idleMillis: 600 },
    { route: '/a', count: 1 },
    { method: 'POST', route: '/trips', count: 1 },
  ])
  t.equal(report.holders[0]?.lastStatement, 'select 2', 'of the oldest')
  t.match(report.waiters, [
    { route: '/a', count: 2, oldestMillis: 1500 },
    { route: '/b', count: 1 },
  ])
  t.match(report, { pool: 'db', size: 4, maxOverflow: 0, timeoutMillis: 1000, open: 4, checkedOut: 4, waiting: 3 })
  t.equal(new Date(report.at).toISOString(), report.at)
  t.match(structuredClone(report), JSON.parse(JSON.stringify(report)), 'plain data')
})

test('the line names sizes, holders and the verdict, and stays a line', async (t) => {
  const lastStatement = `select\n  ${'very '.repeat(80)} long`
  const holders = ['/a', '/b', '/c', '/d', '/e', '/f', '/g'].map((route) => holder(route, { lastStatement }))
  const line = sentenceOf(makeReport(facts({ holders })))
  t.match(
    line,
    /^request-db: no connection from pool "db" of size 4 overflow 0: 1 waiting; held by GET \/a x1 \(oldest/,
  )
  t.match(line, / and 2 more; verdict held-idle: /)
  t.notMatch(line, /\n/)
  t.ok(line.length < 1800, `${line.length} characters`)
})

test('a pool of which nobody holds anything, and one that closes', async (t) => {
  t.match(sentenceOf(makeReport(facts({ holders: [], waiters: [] }))), /0 waiting; held by nobody; verdict/)
  const closed = makeReport(facts({ holders: [holder('/a')] }, { code: 'FST_REQUEST_DB_POOL_CLOSED' }))
  t.equal(closed.verdict, undefined)
  t.match(sentenceOf(closed), /; the server is shutting down$/)
  const lost = makeReport(facts({}, { code: 'FST_REQUEST_DB_CONNECTION_LOST', cause: new Error('terminated') }))
  t.match(sentenceOf(lost), /^request-db: pool "db" of size 4 overflow 0 lost a connection: /)
})
