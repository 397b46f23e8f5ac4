import { createServer } from 'node:net'
import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { Report, RequestDbOptions, Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { listen } from '../support/http-client.ts'
import { startProxy } from '../support/proxy.ts'
import { get, says, watchRefusals } from '../support/refusals.ts'
import { NOTES } from '../support/schema.ts'
import { ownServer } from '../support/server.ts'
import { type Test, t, test } from '../support/test.ts'

// Each cause is provoked on a real server; the verdict and the log line must name it, and the guilty route.

const database = await createDatabase(t, { sql: `${NOTES}; insert into notes (note) values ('one')` })
const appOf = (t: Test, options: RequestDbOptions, routes: (app: FastifyInstance) => unknown) =>
  watchRefusals(t, database, options, routes)
const sleep = (db: Session, seconds: number) => sql`select pg_sleep(${seconds})`.execute(db)
const one = (db: Session) => sql`select 1`.execute(db)

test('held-idle: connections come back, but are idle while the handler does other work', async (t) => {
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 250 } }, (app) => {
    app.get('/report', async ({ db }) => {
      await one(db)
      await pause(120)
      return 'ok'
    })
    app.get('/quick', ({ db }) => one(db))
  })
  await Promise.all([get(watched.app, '/report', 20), get(watched.app, '/quick', 5)])
  const report = says(t, watched, 'held-idle', 'GET /report')
  t.match(report.holders[0], { method: 'GET', route: '/report' })
  t.match(report.verdict?.sentence, /commit\(\) before it/)
})

test('slow-sql: the server is kept busy', async (t) => {
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 400 } }, (app) => {
    app.get('/slow', ({ db }) => sleep(db, 0.6))
    app.get('/quick', ({ db }) => one(db))
  })
  await Promise.all([get(watched.app, '/slow', 6), get(watched.app, '/quick', 4)])
  says(t, watched, 'slow-sql', 'GET /slow')
})

test('pool-too-small: busy, short holds, and more arrivals than it can serve', async (t) => {
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 250 } }, (app) => {
    app.get('/busy', ({ db }) => sleep(db, 0.02))
  })
  await get(watched.app, '/busy', 60)
  const report = says(t, watched, 'pool-too-small', 'GET /busy')
  const { neededConnections } = report.verdict!.evidence as { neededConnections: number }
  t.ok(neededConnections > 1 && neededConnections < 60, `${neededConnections} would do`)
})

test('lock-wait: a route of ours blocks the others', async (t) => {
  const watched = await appOf(t, { pool: { size: 3, timeoutMillis: 600 } }, (app) => {
    app.get('/holder', async ({ db }) => {
      await sql`update notes set note = 'held' where id = 1`.execute(db)
      await pause(1500)
      return 'ok'
    })
    app.get('/victim', ({ db }) => sql`update notes set note = 'mine' where id = 1`.execute(db))
  })
  const held = watched.app.inject('/holder')
  await eventually(() =>
    watched.app.db.snapshot().holders.some(({ lastStatement, state }) => {
      return state === 'idle' && lastStatement?.startsWith('update') === true
    }),
  )
  await get(watched.app, '/victim', 8)
  await held
  const report = says(t, watched, 'lock-wait', 'GET /holder')
  t.match(report.verdict?.evidence, { blockers: [{ route: 'GET /holder', state: 'idle in transaction' }] })
})

test('lock-wait: somebody else blocks us', async (t) => {
  const stranger = await database.client()
  t.teardown(() => stranger.end())
  await stranger.query(`set application_name = 'psql of somebody'; begin; lock table notes in access exclusive mode`)
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 500 } }, (app) => {
    app.get('/victim', ({ db }) => db.selectFrom('notes').selectAll().execute())
  })
  const answers = get(watched.app, '/victim', 6)
  await eventually(() => watched.refusals.length >= 4)
  await stranger.query('rollback')
  await answers
  const report = says(t, watched, 'lock-wait', 'GET /victim')
  t.match(report.verdict?.sentence, /psql of somebody/)
})

test('leak: a session that was opened in a request outlives its response', async (t) => {
  const over = gate()
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 300 }, leakDetectionMillis: 5000 }, (app) => {
    app.get('/leaks', async () => {
      void app.db.session(async (db) => {
        await one(db)
        await over.opened
      })
      return 'ok'
    })
    app.get('/victim', ({ db }) => one(db))
  })
  await get(watched.app, '/leaks', 2)
  await eventually(() => watched.app.db.snapshot().holders.filter(({ state }) => state === 'idle').length === 2)
  await get(watched.app, '/victim', 3)
  const report = says(t, watched, 'leak', 'GET /leaks')
  t.match(String(report.verdict?.evidence.checkedOutAt), /causes\.ts/, 'where it was checked out')
  over.open()
})

test('leak: handlers that never end, beyond leakDetectionMillis', async (t) => {
  const over = gate()
  const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 300 }, leakDetectionMillis: 150 }, (app) => {
    app.get('/stuck', async ({ db }) => {
      await one(db)
      await over.opened
    })
    app.get('/victim', ({ db }) => one(db))
  })
  const stuck = get(watched.app, '/stuck', 2)
  await eventually(() => watched.app.db.snapshot().checkedOut === 2)
  await get(watched.app, '/victim', 3)
  says(t, watched, 'leak', 'GET /stuck')
  over.open()
  await stuck
  const leaks = watched.log.lines.filter(({ requestDb }) => (requestDb as { event?: string })?.event === 'leak')
  t.equal(leaks.length, 4, 'each is logged once, and once more when it comes back')
  t.match(leaks[0]?.msg, /GET \/stuck has held a connection for .* is it leaked\? It was checked out\n.*causes\.ts/)
  t.match(leaks[3]?.msg, /came back after/)
})

for (const [how, between] of [
  ['at once', async () => {}],
  ['after something else', () => pause(30)],
] as const) {
  test(`hold-and-wait: a request that holds a connection waits for a second one ${how}`, async (t) => {
    const watched = await appOf(t, { pool: { size: 2, timeoutMillis: 400 } }, (app) => {
      app.get('/audit', async ({ db }) => {
        await one(db)
        await between()
        await app.db.session((own) => one(own))
        return 'ok'
      })
    })
    const answers = get(watched.app, '/audit', 4)
    await answers
    says(t, watched, 'hold-and-wait', 'GET /audit')
    // By now it is known who opens sessions: it is told before anybody is refused.
    const before = watched.log.lines.length
    const refusals = watched.refusals.length
    const again = get(watched.app, '/audit', 4)
    await eventually(() => watched.refusals.length > refusals)
    t.ok(watched.log.lines.length >= before)
    await again
    says(t, watched, 'hold-and-wait', 'GET /audit')
  })
}

test('hold-and-wait is told at once, with both call sites', async (t) => {
  const over = gate()
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 60_000 }, leakDetectionMillis: 60_000 }, (app) => {
    app.get('/audit', async ({ db }) => {
      await one(db)
      const second = app.db.session((own) => one(own))
      await over.opened
      await db.commit()
      await second
      return 'ok'
    })
  })
  const answer = watched.app.inject('/audit')
  await eventually(() => watched.reports().length === 1)
  t.match(watched.reports()[0], {
    requestDb: { verdict: { cause: 'hold-and-wait', routes: ['GET /audit'], evidence: { waitingForSecond: 1 } } },
  })
  const { evidence } = (watched.reports()[0]!.requestDb as Report).verdict!
  t.match(String(evidence.holdsAt), /causes\.ts/)
  t.match(String(evidence.waitsAt), /causes\.ts/)
  t.not(evidence.holdsAt, evidence.waitsAt)
  over.open()
  t.equal((await answer).statusCode, 200)
})

for (const [what, connectionOf, says_] of [
  ['refused', async () => ({ port: await freePort() }), /nobody listens/],
  ['unknown host', async () => ({ host: 'database.invalid' }), /DNS/],
  ['wrong password', async () => ({ user: 'nobody_at_all', password: 'wrong' }), /user or the password/],
  ['no such database', async () => ({ database: 'no_such_database' }), /does not exist/],
] as const) {
  test(`unreachable: ${what}`, async (t) => {
    const own = await connectionOf()
    const watched = await appOf(t, { connection: { ...asConfig(database.connectionString), ...own } }, (app) => {
      app.get('/victim', ({ db }) => one(db))
    })
    await get(watched.app, '/victim', 2)
    says(t, watched, 'unreachable')
    t.match(watched.refusals[0]?.report?.verdict?.sentence, says_)
  })
}

test('unreachable: starting up', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.failStartup('57P03')
  const watched = await appOf(t, { connectionString: proxy.connectionString }, (app) => {
    app.get('/victim', ({ db }) => one(db))
  })
  await get(watched.app, '/victim', 1)
  says(t, watched, 'unreachable')
  t.match(watched.refusals[0]?.report?.verdict?.sentence, /starting up/)
})

test('unreachable: silent, for who opens a connection and for who waits', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  proxy.silenceStartup()
  const { connectionString } = proxy
  const watched = await appOf(t, { connectionString, pool: { size: 1, timeoutMillis: 300 } }, (app) => {
    app.get('/victim', ({ db }) => one(db))
  })
  await get(watched.app, '/victim', 3)
  says(t, watched, 'unreachable')
  t.match(watched.refusals[0]?.report?.verdict?.sentence, /does not answer/)
})

test('unreachable: a server that goes silent while it is used', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const { connectionString } = proxy
  const watched = await appOf(
    t,
    { connectionString, pool: { size: 2, timeoutMillis: 1500 }, settleTimeoutMillis: 300 },
    (app) => {
      app.get('/victim', ({ db }) => one(db))
    },
  )
  await get(watched.app, '/victim', 2)
  proxy.swallow({ sockets: 'all' })
  const port = await listen(watched.app)
  const answers = Array.from({ length: 5 }, () =>
    fetch(`http://127.0.0.1:${port}/victim`, { signal: AbortSignal.timeout(4000) }).catch(() => {}),
  )
  await eventually(() => watched.refusals.length > 0, { withinMillis: 5000 })
  proxy.restore()
  proxy.cut('reset')
  await Promise.all(answers)
  says(t, watched, 'unreachable')
})

test('server-full: others hold all of its connections', async (t) => {
  const server = await ownServer(t, {
    flags: ['max_connections=10', 'superuser_reserved_connections=0', 'reserved_connections=0'],
  })
  const small = await createDatabase(t, { server })
  const watched = await appOf(
    t,
    { connectionString: small.connectionString, pool: { size: 4 }, capacityCheck: true },
    (app) => {
      app.get('/victim', async ({ db }) => {
        await one(db)
        await pause(100)
        return 'ok'
      })
    },
  )
  await get(watched.app, '/victim', 1)
  const others = await Promise.all(Array.from({ length: 8 }, () => small.client().catch(() => undefined)))
  await get(watched.app, '/victim', 4)
  const report = says(t, watched, 'server-full')
  t.match(report.verdict?.sentence, /53300/)
  t.match(report.verdict?.evidence, { maxConnections: 10, heldByOthers: 9 })
  await Promise.all(others.map((client) => client?.end()))
})

test('who is refused because the server shuts down has a report, and nothing to change', async (t) => {
  const over = gate()
  const watched = await appOf(t, { pool: { size: 1 } }, (app) => {
    app.get('/victim', async ({ db }) => {
      await one(db)
      await over.opened
      return 'ok'
    })
  })
  const first = watched.app.inject('/victim')
  await eventually(() => watched.app.db.snapshot().checkedOut === 1)
  const second = watched.app.inject('/victim')
  await eventually(() => watched.app.db.snapshot().waiting === 1)
  const closed = watched.app.close()
  await second
  over.open()
  await Promise.all([first, closed])
  t.match(watched.refusals[0], { code: 'FST_REQUEST_DB_POOL_CLOSED' })
  t.match(watched.refusals[0]?.report, { pool: 'db', size: 1, checkedOut: 1, verdict: undefined })
})

test('a lost connection has a report', async (t) => {
  const watched = await appOf(t, {}, (app) => {
    app.get('/victim', ({ db }) => sql`select pg_terminate_backend(pg_backend_pid())`.execute(db))
  })
  await get(watched.app, '/victim', 1)
  t.match(watched.refusals[0], { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  says(t, watched, 'unreachable')
  t.match(
    watched.reports()[0]?.msg,
    /lost a connection: .* A connection to PostgreSQL was lost: the connection was cut/,
  )
})

test('the report is not for clients, nor in the log of the error itself', async (t) => {
  const watched = await appOf(t, { pool: { size: 1, timeoutMillis: 0 } }, (app) => {
    app.get('/secret', ({ db }) => sleep(db, 0.3))
  })
  const answers = await get(watched.app, '/secret', 2)
  const refused = answers.find(({ statusCode }) => statusCode === 503)
  t.notMatch(refused?.body, /secret|pg_sleep|verdict/)
  t.notOk(Object.keys(watched.refusals[0]!).includes('report'))
  t.equal(watched.log.lines.filter((line) => JSON.stringify(line).includes('"verdict"')).length, 1)
})

function asConfig(connectionString: string) {
  const { hostname: host, port, username: user, password, pathname } = new URL(connectionString)
  return { host, port: Number(port), user, password, database: pathname.slice(1) }
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => server.once('listening', resolve))
  const { port } = server.address() as { port: number }
  await new Promise((resolve) => server.close(resolve))
  return port
}
