import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// One session for all of a request, none after it.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const pidOf = async (db: Session) =>
  (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)).rows[0]?.pid
const ENDED = { code: 'FST_REQUEST_DB_SESSION_ENDED', statusCode: 500, retryable: false }

t.beforeEach(() => database.query('truncate notes restart identity'))

test('ten first statements at once: one check-out, one BEGIN, one backend', async (t) => {
  const { post, app, proxy } = await oneRouteThroughProxy(
    t,
    database,
    (db) => Promise.all(Array.from({ length: 10 }, () => pidOf(db))),
    { pool: { size: 5 } },
  )
  const before = app.db.snapshot().totals.checkouts
  const pids = (await post()).json() as number[]
  t.equal(new Set(pids).size, 1)
  t.equal(app.db.snapshot().totals.checkouts, before + 1)
  t.equal(
    proxy
      .statements()
      .flat()
      .filter((text) => text === 'BEGIN').length,
    1,
  )
})

test('ten first statements at once on a pool that has no connection yet', async (t) => {
  const { post, app } = await oneRoute(t, database, (db) => Promise.all(Array.from({ length: 10 }, () => pidOf(db))))
  t.equal(new Set((await post()).json()).size, 1)
  t.match(app.db.snapshot(), { open: 1, totals: { checkouts: 1 } })
})

test('five statements at once after the first one: one backend, and pg has nothing to warn of', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const first = await pidOf(db)
    return [first, ...(await Promise.all(Array.from({ length: 5 }, () => pidOf(db))))]
  })
  t.equal(new Set((await post()).json()).size, 1)
})

test('answers reach the statement that asked, however many are under way', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const ask = async (n: number) => (await sql<{ n: number }>`select ${n}::int as n`.execute(db)).rows[0]?.n
    const wanted = Array.from({ length: 300 }, (_, n) => n)
    t.strictSame(await Promise.all(wanted.map(ask)), wanted)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('hooks and handler share it: one BEGIN, one backend, one COMMIT', async (t) => {
  const pids: unknown[] = []
  const { app, proxy } = await oneRouteThroughProxy(t, database, () => 'unused', {
    beside: (app) => {
      const note = async ({ db }: { db: Session }) => void pids.push(await pidOf(db))
      app.get(
        '/',
        {
          onRequest: note,
          preValidation: note,
          preHandler: note,
          preSerialization: async (request, _reply, payload) => note(request).then(() => payload),
          onSend: async (request, _reply, payload) => note(request).then(() => payload),
        },
        async (request) => {
          await note(request)
          return { ok: true }
        },
      )
    },
  })
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal(pids.length, 6)
  t.equal(new Set(pids).size, 1)
  const sent = proxy.statements().flat()
  t.equal(sent[0], 'BEGIN')
  t.equal(sent.at(-1), 'COMMIT')
  t.equal(sent.filter((text) => text === 'BEGIN' || text === 'COMMIT').length, 2)
})

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`a later statement nobody awaits is in what is committed, or refused; never beyond it (${commitOn})`, async (t) => {
    const ended = gate<unknown>()
    const { post, proxy, app } = await oneRouteThroughProxy(
      t,
      database,
      async (db) => {
        await insert(db, 'first')
        insert(db, 'not awaited').then(() => ended.open(undefined), ended.open)
        return 'ok'
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 200)
    const error = await ended.opened
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notes(), error === undefined ? ['first', 'not awaited'] : ['first'])
    t.equal(proxy.statements().flat().at(-1), 'COMMIT')
  })

  test(`a statement nobody awaits of a request that throws is not kept (${commitOn})`, async (t) => {
    const ended = gate<unknown>()
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'first')
        insert(db, 'not awaited').then(ended.open, ended.open)
        throw new Error('mine')
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 500)
    await ended.opened
    t.strictSame(await notes(), [])
  })

  test(`a slow statement nobody awaits is finished before the commit (${commitOn})`, async (t) => {
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'first')
        void sql`insert into notes (note) select 'slow' from pg_sleep(0.2)`.execute(db)
        await pidOf(db)
        return 'ok'
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 200)
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(await notes(), ['first', 'slow'])
  })
}

test('settleTimeoutMillis is for COMMIT alone: a slow statement before it that nobody awaits does not count', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'first')
      sql`insert into notes (note) select 'slow' from pg_sleep(0.5)`.execute(db).catch(() => {})
      await new Promise((resolve) => setImmediate(resolve))
      return 'ok'
    },
    { settleTimeoutMillis: 150 },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['first', 'slow'])
})

test('a chain of statements nobody awaits: what comes after the end is refused', async (t) => {
  const goOn = gate()
  const ended = gate<unknown>()
  const { post, app } = await oneRoute(t, database, async (db) => {
    const chain = async () => {
      await insert(db, 'first')
      await goOn.opened
      await insert(db, 'second')
    }
    chain().then(ended.open, ended.open)
    await pidOf(db)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  const { checkouts } = app.db.snapshot().totals
  goOn.open()
  t.match(await ended.opened, ENDED)
  t.strictSame(await notes(), ['first'])
  t.equal(app.db.snapshot().totals.checkouts, checkouts)
})

for (const used of [true, false]) {
  test(`every use of a session that was ${used ? 'used' : 'never used'} is refused after its request, nothing is checked out`, async (t) => {
    let kept: Session | undefined
    const { post, app } = await oneRoute(t, database, async (db) => {
      kept = db
      if (used) await insert(db, 'a')
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    const { checkouts } = app.db.snapshot().totals
    const db = kept as Session
    const uses: [string, () => unknown][] = [
      ['statement', () => insert(db, 'late')],
      ['raw', () => sql`select 1`.execute(db)],
      ['derived', () => insert(db.withSchema('public'), 'late')],
      ['nested', () => db.transaction().execute(() => insert(db, 'late'))],
      ['controlled', () => db.startTransaction().execute()],
      ['connection', () => db.connection().execute((connection) => insert(connection, 'late'))],
      ['stream', () => db.selectFrom('notes').selectAll().stream(1).next()],
      ['withClient', () => db.withClient(async () => {})],
      ['begin', () => db.begin()],
      ['commit', () => db.commit()],
      ['rollback', () => db.rollback()],
      ['flush', () => db.flush()],
      ['add', () => db.add(db.insertInto('notes').values({ note: 'late' }))],
    ]
    for (const [name, use] of uses) await t.rejects(async () => use(), ENDED, name)
    t.equal(db.state, 'ended')
    t.equal(db.inTransaction, false)
    t.equal(app.db.snapshot().totals.checkouts, checkouts)
    t.strictSame(await notes(), used ? ['a'] : [])
  })
}

test("in the app's onResponse hook it is over", async (t) => {
  const late = gate<unknown>()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await insert(db, 'a')
      return 'ok'
    },
    {
      beside: (app) => {
        app.addHook('onResponse', async ({ db }) => void (await insert(db, 'late').then(late.open, late.open)))
      },
    },
  )
  t.equal((await post()).statusCode, 200)
  t.match(await late.opened, ENDED)
  t.strictSame(await notes(), ['a'])
  t.equal(app.db.snapshot().totals.checkouts, 1)
})

test('after await reply it is over', async (t) => {
  const late = gate<unknown>()
  const { post } = await oneRoute(t, database, async (db, _request, reply) => {
    await insert(db, 'a')
    reply.send('ok')
    await reply
    await insert(db, 'late').then(late.open, late.open)
    return reply
  })
  t.equal((await post()).statusCode, 200)
  t.match(await late.opened, ENDED)
  t.strictSame(await notes(), ['a'])
})

test('a second session inside a request, where the pool has but one connection: POOL_TIMEOUT, not a deadlock', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db, { server }) => {
      await insert(db, 'outer')
      await server.db.session((own) => insert(own, 'inner'))
      return 'not reached'
    },
    { pool: { size: 1, timeoutMillis: 150 } },
  )
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
  t.strictSame(await notes(), [])
  await eventually(() => app.db.snapshot().idle === 1)
  t.equal(app.db.snapshot().totals.timeouts, 1)
})

test('a second session inside a request is its own: what it commits is kept though the request fails', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db, { server }) => {
      await insert(db, 'gone')
      await server.db.session((audit) => insert(audit, 'audit'))
      throw new Error('mine')
    },
    { pool: { size: 2 } },
  )
  t.equal((await post()).statusCode, 500)
  t.strictSame(await notes(), ['audit'])
})

test('a first statement that gets no connection: 503, and the next one tries again', async (t) => {
  const goOn = gate()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      const timedOut = { code: 'FST_REQUEST_DB_POOL_TIMEOUT' }
      await t.rejects(Promise.all([insert(db, 'a'), insert(db, 'b')]), timedOut)
      t.equal(db.state, 'idle')
      goOn.open()
      await eventually(() => app.db.snapshot().checkedOut === 0)
      await insert(db, 'c')
      return 'ok'
    },
    { pool: { size: 1, timeoutMillis: 150 } },
  )
  const holder = app.db.session(async (db) => {
    await db.begin()
    await goOn.opened
  })
  await eventually(() => app.db.snapshot().checkedOut === 1)
  t.equal((await post()).statusCode, 200)
  await holder
  t.strictSame(await notes(), ['c'])
})
