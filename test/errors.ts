import Fastify from 'fastify'
import { sql } from 'kysely'
import pg from 'pg'
import * as errors from '../lib/errors.ts'
import type { RequestDbError } from '../lib/index.ts'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { add } from './support/notebook.ts'
import { startProxy } from './support/proxy.ts'
import { NOTES } from './support/schema.ts'
import { t, test } from './support/test.ts'

const { PoolTimeout, PoolSaturated, PoolClosed, Unavailable, ConnectionLost, CommitUnknown } = errors
const { RetriesExhausted, NoSession } = errors
const { TransactionAborted, SessionEnded, NestedConflict, InvalidOption, AlreadyRegistered, SettleFailed } = errors

const cause = new Error('connect ECONNREFUSED 10.0.0.1:5432')

/** Every error of the plugin, as it is made. */
const TABLE: { error: RequestDbError; code: string; status: number; retryable: boolean; says: RegExp }[] = [
  {
    error: new PoolTimeout(8, 4, '10.00', 'db', { cause }),
    code: 'POOL_TIMEOUT',
    status: 503,
    retryable: true,
    says: /^Pool limit of size 8 overflow 4 reached, connection timed out, timeout 10\.00 s \(pool "db"\): /,
  },
  {
    error: new PoolSaturated(8, 4, 1000, 'db', { cause }),
    code: 'POOL_SATURATED',
    status: 503,
    retryable: true,
    says: /^Pool limit of size 8 overflow 4 reached, and 1000 sessions are waiting already \(pool "db"\): /,
  },
  {
    error: new PoolClosed('db', { cause }),
    code: 'POOL_CLOSED',
    status: 503,
    retryable: true,
    says: /shutting down: try again/,
  },
  {
    error: new Unavailable('db', { cause }),
    code: 'UNAVAILABLE',
    status: 503,
    retryable: true,
    says: /cannot open a connection.*: the reason is in the log and in error\.cause$/,
  },
  {
    error: new ConnectionLost('db', { cause }),
    code: 'CONNECTION_LOST',
    status: 503,
    retryable: true,
    says: /since the last commit is rolled back, try again$/,
  },
  {
    error: new CommitUnknown('db', { cause }),
    code: 'COMMIT_UNKNOWN',
    status: 500,
    retryable: false,
    says: /may or may not have been kept, look before you repeat/,
  },
  {
    error: new TransactionAborted('db', 'a statement failed', { cause }),
    code: 'TRANSACTION_ABORTED',
    status: 500,
    retryable: false,
    says: /^Nothing was committed \(pool "db"\): a statement failed$/,
  },
  {
    error: new SessionEnded('db', 'the response has been sent', { cause }),
    code: 'SESSION_ENDED',
    status: 500,
    retryable: false,
    says: /has ended \(pool "db"\): the response has been sent$/,
  },
  {
    error: new RetriesExhausted(3, 'db', { cause }),
    code: 'RETRIES_EXHAUSTED',
    status: 503,
    retryable: true,
    says: /^None of 3 attempts succeeded \(pool "db"\): nothing was kept, try again later$/,
  },
  {
    error: new NoSession('db', 'call it inside a request', { cause }),
    code: 'NO_SESSION',
    status: 500,
    retryable: false,
    says: /^currentSession\(\) finds no session \(pool "db"\): call it inside a request$/,
  },
  {
    error: new NestedConflict('await one before the next', { cause }),
    code: 'NESTED_CONFLICT',
    status: 500,
    retryable: false,
    says: /^await one before the next$/,
  },
  {
    error: new InvalidOption('pool.size', 'a whole number', '-1', { cause }),
    code: 'INVALID_OPTION',
    status: 500,
    retryable: false,
    says: /^Option pool\.size: expected a whole number, got -1$/,
  },
  {
    error: new AlreadyRegistered('db', { cause }),
    code: 'ALREADY_REGISTERED',
    status: 500,
    retryable: false,
    says: /^The name "db" is taken .* `decorator`$/,
  },
]

for (const { error, code, status, retryable, says } of TABLE) {
  t.test(`${code} is a Fastify error with a status, that says what to do and whether to try again`, async (t) => {
    t.ok(error instanceof Error)
    t.match(error, { name: 'FastifyError', code: `FST_REQUEST_DB_${code}`, statusCode: status, retryable })
    t.match(error.message, says)
    t.equal(error.cause, cause)
    t.notMatch(error.message, /10\.0\.0\.1|ECONNREFUSED/, 'the cause is not for the client')
    t.match(error.stack, /errors\.ts/, 'it knows where it was made')
  })

  t.test(`${code} thrown in a handler is answered without its cause`, async (t) => {
    const app = Fastify()
    app.get('/', async () => {
      throw error
    })
    const answer = await app.inject('/')
    t.equal(answer.statusCode, status)
    t.strictSame(answer.json(), {
      statusCode: status,
      code: `FST_REQUEST_DB_${code}`,
      error: status === 503 ? 'Service Unavailable' : 'Internal Server Error',
      message: error.message,
    })
  })
}

t.test('the table has every error there is', async (t) => {
  const made = Object.values(errors).filter(
    (exported) => typeof exported === 'function' && exported.prototype instanceof Error && exported !== SettleFailed,
  )
  t.equal(made.length, TABLE.length)
  for (const one of made) t.ok(TABLE.some(({ error }) => error instanceof one))
  t.equal(new Set(TABLE.map(({ code }) => code)).size, TABLE.length)
})

t.test('an error without a cause has none', async (t) => {
  t.equal(new PoolClosed('db').cause, undefined)
  t.notOk('headers' in new PoolClosed('db'), 'headers are for those that know when to come back')
})

t.test('a settlement that PostgreSQL refused bears its SQLSTATE, and says whether to try again', async (t) => {
  for (const [sqlState, retryable] of [
    ['23503', false],
    ['23505', false],
    ['40001', true],
    ['40P01', true],
    ['53100', false],
  ] as const) {
    const refusal = Object.assign(new pg.DatabaseError('Key (user)=(somebody) is missing', 1, 'error'), {
      code: sqlState,
      severity: 'ERROR',
    })
    const error = new SettleFailed('COMMIT', 'db', refusal)
    t.match(error, { name: 'FastifyError', statusCode: 500, code: sqlState, retryable, cause: refusal })
    t.equal(error.message, `COMMIT failed with ${sqlState} (pool "db"): nothing was kept`)
  }
  t.match(new SettleFailed('COMMIT', 'db', new Error('?')), { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
})

t.test('an SQLSTATE is only what PostgreSQL says', async (t) => {
  t.equal(errors.sqlStateOf({ code: '23505', severity: 'ERROR' }), '23505')
  t.equal(errors.sqlStateOf({ code: '23505', severity: 'FEHLER' }), '23505')
  t.equal(errors.sqlStateOf({ code: 'ECONNRESET' }), undefined)
  t.equal(errors.sqlStateOf(new Error('Connection terminated unexpectedly')), undefined)
  t.equal(errors.sqlStateOf({ code: 5, severity: 'ERROR' }), undefined)
  for (const nothing of [undefined, null, 'text', 5]) t.equal(errors.sqlStateOf(nothing), undefined)
})

const database = await createDatabase(t, { sql: `${NOTES}; create unique index one_note on notes (note)` })

test('what a client is told names no host, no user, no password, no SQL and no route', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { hostname, username, password, pathname } = new URL(database.connectionString)
  const secrets = [hostname, username, password, pathname.slice(1), String(proxy.port)]
  secrets.push('insert', 'select', 'BEGIN', '/hidden-route', 'notes')
  const holding = gate()
  // A slow machine may take its time to connect.
  const connection = { connectionString: proxy.connectionString, connectionTimeoutMillis: 10_000 }
  const options = { connection, pool: { size: 1, maxWaiting: 1, timeoutMillis: 100 } }
  const app = await buildApp(t, database, { ...options, settleTimeoutMillis: 100 }, (app) => {
    app.post('/hidden-route', async ({ db }) => {
      await add(db, 'x')
    })
    app.post('/hidden-route/held', async ({ db }) => {
      await add(db, 'x')
      await holding.opened
      throw new Error('mine')
    })
    app.post('/hidden-route/swallowed', async ({ db }) => {
      await add(db, 'x')
      await sql`select 1/0`.execute(db).catch(() => {})
    })
    app.post('/hidden-route/ended', async ({ db }) => {
      await sql`rollback`.execute(db)
      await add(db, 'x')
    })
  })
  const seen = new Set<string>()
  const post = async (url: string) => {
    const answer = await app.inject({ method: 'POST', url })
    const { code, message } = answer.json()
    seen.add(code.replace('FST_REQUEST_DB_', ''))
    for (const secret of secrets) t.notOk(message.includes(secret), `'${message}' does not contain '${secret}'`)
  }
  await proxy.refuse()
  await post('/hidden-route')
  await proxy.accept()
  const held = app.inject({ method: 'POST', url: '/hidden-route/held' })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  await Promise.all([post('/hidden-route'), post('/hidden-route')])
  holding.open()
  await held
  await post('/hidden-route/swallowed')
  await post('/hidden-route/ended')
  proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset', { times: 2 })
  await post('/hidden-route')
  proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
  await post('/hidden-route')
  await app.close()
  t.strictSame([...seen].sort(), [
    'COMMIT_UNKNOWN',
    'CONNECTION_LOST',
    'POOL_SATURATED',
    'POOL_TIMEOUT',
    'TRANSACTION_ABORTED',
    'UNAVAILABLE',
  ])
})

test('what PostgreSQL says of a statement reaches the handler, and who asked, as pg made it', async (t) => {
  const app = await buildApp(t, database, {}, (app) => {
    app.post('/', async ({ db }) => {
      await db
        .insertInto('notes')
        .values([{ note: 'twice' }, { note: 'twice' }])
        .execute()
    })
    app.setErrorHandler((error: Error & { code?: string; constraint?: string }, _request, reply) => {
      t.ok(error instanceof pg.DatabaseError)
      return reply.code(409).send({ code: error.code, constraint: error.constraint })
    })
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.strictSame(answer.json(), { code: '23505', constraint: 'one_note' })
  t.strictSame(await database.rows('notes'), [])
})
