import { checkOptions } from '../lib/check-options.ts'
import type { RequestDbOptions } from '../lib/options.ts'
import { t } from './support/test.ts'

const connectionString = 'postgres://somebody:secret@bouncer.example/trips'
const pooled = (options: RequestDbOptions) =>
  checkOptions({ ...(options.connection === undefined && { connectionString }), pooler: 'transaction', ...options })
    .pool

/** The text of the refusal. */
function refusal(options: RequestDbOptions): string {
  try {
    pooled(options)
    return 'accepted'
  } catch (error) {
    t.equal((error as { code?: string }).code, 'FST_REQUEST_DB_INVALID_OPTION')
    return (error as Error).message
  }
}

t.test('with a pooler there is no ping, and nothing else changes', async (t) => {
  const { connection: _, ...pool } = pooled({})
  t.strictSame(pool, { ...checkOptions({ connectionString }).pool, pooler: 'transaction', prePing: false })
  t.equal(checkOptions({ connectionString }).pool.pooler, false)
  t.equal(pooled({ pool: { prePing: false }, preparedStatements: false, resetOnReturn: 'rollback' }).prePing, false)
})

t.test('what cannot work through a pooler is refused, with the reason', async (t) => {
  t.equal(
    refusal({ preparedStatements: {} }),
    "Option preparedStatements: expected false with pooler 'transaction', got named statements, which the next " +
      'transaction may not find',
  )
  t.match(
    refusal({ resetOnReturn: 'discard' }),
    /^Option resetOnReturn: expected 'rollback' .*server_reset_query_always/,
  )
  t.match(refusal({ pool: { prePing: {} } }), /^Option pool.prePing: expected false .* got a ping/)
})

t.test('start-up parameters that PgBouncer refuses are refused at once, and the text says what to use', async (t) => {
  t.equal(
    refusal({ connection: { statement_timeout: 5000 } }),
    'Option connection.statement_timeout: expected statementTimeoutMillis in its place, which is set inside the ' +
      'transaction: PgBouncer refuses it at start-up, got 5000',
  )
  t.match(refusal({ connection: { lock_timeout: 500 } }), /^Option connection.lock_timeout: expected settings: /)
  t.match(refusal({ connection: { idle_in_transaction_session_timeout: 1 } }), /ALTER ROLE/)
  t.match(refusal({ connection: { options: '-c app.secret=x' } }), /^Option connection.options: .*, got a value$/)
  t.match(
    refusal({ connectionString: `${connectionString}?statement_timeout=1000` }),
    /^Option connection.statement_timeout: expected statementTimeoutMillis .* got a value in the connection string$/,
  )
  t.equal(refusal({ connection: { application_name: 'trips', client_encoding: 'UTF8' } }), 'accepted')
  t.equal(refusal({ statementTimeoutMillis: 1000 }), 'accepted')
})

t.test('so is PGOPTIONS, which pg would send along', async (t) => {
  const before = process.env.PGOPTIONS
  t.teardown(() => {
    if (before === undefined) delete process.env.PGOPTIONS
    else process.env.PGOPTIONS = before
  })
  process.env.PGOPTIONS = '-c statement_timeout=5s'
  t.match(refusal({}), /^Option connection.options: .*, got a value in the environment$/)
})

t.test("the app's own stream is not opened for the check", async (t) => {
  let opened = 0
  const stream = () => {
    opened++
    throw new Error('not yet')
  }
  t.equal(refusal({ connection: { host: 'bouncer.example', stream } }), 'accepted')
  t.equal(opened, 0)
})
