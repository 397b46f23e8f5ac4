import { hasWaitedInPooler, saidByPooler } from '../../lib/observe/behind-pooler.ts'
import { reasonOf } from '../../lib/observe/unreachable.ts'
import { diagnose } from '../../lib/observe/verdict.ts'
import { facts, holder, lately, use } from '../support/facts.ts'
import { t } from '../support/test.ts'

const said = (message: string, code = '08P01') => Object.assign(new Error(message), { code })

t.test('what PgBouncer says is told in words that help', async (t) => {
  for (const [message, expected] of [
    ['no more connections allowed (max_client_conn)', /raise max_client_conn/],
    ['query_wait_timeout', /query_wait_timeout: hold connections for a shorter time, or raise default_pool_size/],
    ['server login has been failing, try again later (server_login_retry)', /look into its log/],
    ['pgbouncer cannot connect to server', /look into its log/],
    ['server conn crashed?', /look into its log/],
    ['idle transaction timeout', /a time limit of PgBouncer/],
    ['client_idle_timeout', /a time limit of PgBouncer/],
    ['unsupported startup parameter: statement_timeout', /ignore_startup_parameters/],
    ['the pgbouncer is shutting down', /shutting down/],
  ] as const) {
    t.match(reasonOf(said(message)), { kind: 'pooler', sentence: expected }, message)
  }
})

t.test('what PostgreSQL says is not taken for it', async (t) => {
  t.equal(saidByPooler(said('query_wait_timeout', '57014')), undefined)
  t.equal(saidByPooler(said('invalid message format')), undefined)
  t.equal(reasonOf(said('invalid message format'), true).kind, 'lost')
  t.ok(hasWaitedInPooler(said('query_wait_timeout')))
  t.notOk(hasWaitedInPooler(said('idle transaction timeout')))
})

t.test('a verdict of busy connections says where else their time can have gone', async (t) => {
  const busy = (pooler: 'transaction' | false) => {
    const holders = [1, 2, 3, 4].map(() => holder('/report', { heldMillis: 900, busyMillis: 890, state: 'busy' }))
    return diagnose(facts({ holders }, { pooler, recent: lately([use('/report', 9, 900, 890)]) }))
  }
  t.equal(busy('transaction')?.cause, 'slow-sql')
  t.match(busy('transaction')?.sentence, /cl_waiting in SHOW POOLS/)
  t.notMatch(busy(false)?.sentence, /PgBouncer/)
  const idle = facts({ holders: [holder('/slow', { heldMillis: 900 })] }, { pooler: 'transaction' })
  t.notMatch(diagnose(idle)?.sentence, /cl_waiting/)
})
