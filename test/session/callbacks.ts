import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, {
  sql: `${NOTES}; alter table notes add constraint notes_once unique (note) deferrable initially deferred`,
})
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()

t.beforeEach(() => database.query('truncate notes restart identity'))

/** Registers one callback of each kind; what was called is in the list. */
function registrar() {
  const called: string[] = []
  const register = (db: Session, name: string) => {
    db.afterCommit(() => called.push(`${name} committed`))
    db.afterRollback(() => called.push(`${name} rolled back`))
  }
  return { called, register }
}

for (const commitOn of ['onSend', 'onResponse'] as const) {
  test(`afterCommit is called when others can see what was committed (${commitOn})`, async (t) => {
    const seen = gate<unknown>()
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        db.afterCommit(async () => seen.open(await database.rows('notes')))
        db.afterRollback(() => t.fail('afterRollback was called'))
        await insert(db, 'a')
        return 'ok'
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 200)
    t.match(await seen.opened, [{ note: 'a' }])
  })

  test(`afterRollback is called after a request that failed, afterCommit is not (${commitOn})`, async (t) => {
    const { called, register } = registrar()
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        register(db, 'first')
        await insert(db, 'a')
        register(db, 'second')
        throw new Error('mine')
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, 500)
    await eventually(() => called.length > 0)
    t.strictSame(called, ['first rolled back', 'second rolled back'])
  })

  test(`a COMMIT that fails calls afterRollback alone (${commitOn})`, async (t) => {
    const { called, register } = registrar()
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        register(db, 'it')
        await insert(db, 'twice')
        await insert(db, 'twice')
        return 'ok'
      },
      { commitOn },
    )
    t.equal((await post()).statusCode, commitOn === 'onSend' ? 500 : 200)
    await eventually(() => called.length > 0)
    t.strictSame(called, ['it rolled back'])
  })
}

test('callbacks are called in the order they were registered in, those of nested transactions among them', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    register(db, '1')
    await db.transaction().execute(async () => {
      register(db, '2')
      await db.transaction().execute(async () => register(db, '3'))
      register(db, '4')
    })
    register(db, '5')
    await insert(db, 'a')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(
    called,
    ['1', '2', '3', '4', '5'].map((n) => `${n} committed`),
  )
})

test('callbacks of a nested transaction that failed are dropped, with those nested in it', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    register(db, 'outer')
    await db
      .transaction()
      .execute(async () => {
        register(db, 'failed')
        await db.transaction().execute(async () => register(db, 'in the failed one'))
        throw new Error('inner')
      })
      .catch(() => {})
    await db.transaction().execute(async () => register(db, 'kept'))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(called, ['outer committed', 'kept committed'])
})

test('after a hand-made commit its callbacks are called once, and later ones belong to what follows', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    register(db, 'first')
    await db.commit()
    t.strictSame(called, ['first committed'])
    register(db, 'second')
    await insert(db, 'b')
    throw new Error('mine')
  })
  t.equal((await post()).statusCode, 500)
  await eventually(() => called.length === 2)
  t.strictSame(called, ['first committed', 'second rolled back'])
})

test('after a hand-made rollback its callbacks are called once, and later ones belong to what follows', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    register(db, 'first')
    await db.rollback()
    t.strictSame(called, ['first rolled back'])
    register(db, 'second')
    await insert(db, 'b')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(called, ['first rolled back', 'second committed'])
})

test('callbacks that throw, or reject, or throw nothing, are logged and stop nobody', async (t) => {
  const called: string[] = []
  const { post, log } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    db.afterCommit(() => {
      throw new Error('thrown')
    })
    db.afterCommit(async () => {
      throw new Error('rejected')
    })
    db.afterCommit(() => Promise.reject())
    db.afterCommit(() => called.push('last'))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(called, ['last'])
  await eventually(() => log.problems().length === 3)
  t.match(log.problems(), [
    { level: 50, reqId: 'req-1', err: { message: 'thrown' } },
    { level: 50, reqId: 'req-1', err: { message: 'rejected' } },
    { level: 50, reqId: 'req-1' },
  ])
  t.match(await database.rows('notes'), [{ note: 'a' }])
})

test('nobody waits for a callback', async (t) => {
  const { post, app } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    db.afterCommit(() => new Promise(() => {}))
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal(app.db.snapshot().checkedOut, 0)
})

test('a callback finds the session of its request ended, and may open one of its own', async (t) => {
  const mailed = gate<unknown>()
  const refused = gate<unknown>()
  const { post } = await oneRoute(
    t,
    database,
    async (db, request) => {
      await insert(db, 'a')
      db.afterCommit(() => insert(db, 'late').catch(refused.open))
      db.afterCommit(async () => mailed.open(await request.server.db.session((own) => insert(own, 'mail sent'))))
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200)
  t.match(await refused.opened, { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  await mailed.opened
  t.match(await database.rows('notes'), [{ note: 'a' }, { note: 'mail sent' }])
})

test('after a hand-made commit a callback may use the session again', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const second = gate<unknown>()
    await insert(db, 'a')
    db.afterCommit(async () => second.open(await insert(db, 'from the callback')))
    await db.commit()
    await second.opened
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'a' }, { note: 'from the callback' }])
})

test('when the answer to COMMIT is lost neither kind is called: nobody knows', async (t) => {
  const { called, register } = registrar()
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'a')
    register(db, 'it')
    proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'reset')
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_COMMIT_UNKNOWN' })
  t.strictSame(called, [])
  t.match(await database.rows('notes'), [{ note: 'a' }])
})

test('when the connection was lost before COMMIT, afterRollback is called', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
    register(db, 'it')
    await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
    return 'ok'
  })
  t.equal((await post()).statusCode, 503)
  await eventually(() => called.length > 0)
  t.strictSame(called, ['it rolled back'])
})

test('callbacks registered inside withClient belong to the session', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient(async (client) => {
      await client.query("insert into notes (note) values ('raw')")
      register(db, 'inside')
    })
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(called, ['inside committed'])
})

test('callbacks of an autocommit session are called at its end, those of its transactions at theirs', async (t) => {
  const { called, register } = registrar()
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      register(db, 'session')
      await db.transaction().execute(async (trx) => {
        register(db, 'transaction')
        await insert(trx, 'a')
      })
      t.strictSame(called, ['transaction committed'])
      await db
        .transaction()
        .execute(async (trx) => {
          register(db, 'failed')
          await insert(trx, 'b')
          throw new Error('inner')
        })
        .catch(() => {})
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.equal(called[0], 'transaction committed')
  t.equal(called.at(-1), 'session committed')
  t.notOk(called.includes('failed committed'))
})

test('a callback of a transaction of an autocommit session may use the session', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const done = gate<unknown>()
      await db.transaction().execute(async (trx) => {
        await insert(trx, 'a')
        db.afterCommit(() => insert(db, 'b').then(done.open, done.open))
      })
      t.notOk((await done.opened) instanceof Error)
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.match(await database.rows('notes'), [{ note: 'a' }, { note: 'b' }])
})

test('callbacks that nobody would call are refused', async (t) => {
  let kept: Session | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    kept = db
    await insert(db, 'a')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.throws(() => kept?.afterCommit(() => {}), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  t.throws(() => kept?.afterRollback(() => {}), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
})

test('a session outside of a request calls them too', async (t) => {
  const { called, register } = registrar()
  const { app } = await oneRoute(t, database, () => 'unused')
  await app.db.session(async (db) => {
    register(db, 'first')
    await insert(db, 'a')
  })
  await t.rejects(
    app.db.session(async (db) => {
      register(db, 'second')
      throw new Error('mine')
    }),
    { message: 'mine' },
  )
  t.strictSame(called, ['first committed', 'second rolled back'])
})

test('a client that leaves means afterRollback', async (t) => {
  const { called, register } = registrar()
  const inserted = gate()
  const { app } = await oneRoute(t, database, async (db) => {
    register(db, 'it')
    await insert(db, 'a')
    inserted.open()
    await new Promise(() => {})
  })
  const controller = new AbortController()
  app.inject({ method: 'POST', url: '/', signal: controller.signal }).catch(() => {})
  await inserted.opened
  controller.abort()
  await eventually(() => called.length > 0)
  t.strictSame(called, ['it rolled back'])
})
