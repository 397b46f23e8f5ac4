import type { FastifyRequest } from 'fastify'
import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

/* After its end a session is an error, whatever is done with it, and never takes another connection. */
const database = await createDatabase(t, { sql: NOTES })

const uses: Record<string, (db: Session) => unknown> = {
  'a statement': (db) => add(db, 'late'),
  'raw SQL': (db) => sql`select 1`.execute(db),
  'a stream': async (db) => {
    for await (const row of db.selectFrom('notes').selectAll().stream()) t.comment(row)
  },
  'begin()': (db) => db.begin(),
  'commit()': (db) => db.commit(),
  'rollback()': (db) => db.rollback(),
  'flush()': (db) => db.flush(),
  'add()': async (db) => db.add(db.insertInto('notes').values({ note: 'late' })),
  'transaction()': (db) => db.transaction().execute((trx) => trx.selectFrom('notes').selectAll().execute()),
  'startTransaction()': (db) => db.startTransaction().execute(),
  'connection()': (db) => db.connection().execute((one) => one.selectFrom('notes').selectAll().execute()),
  'withClient()': (db) => db.withClient((client) => client.query('select 1')),
  'a session with a schema': (db) => db.withSchema('public').selectFrom('notes').selectAll().execute(),
}

async function isRefused(t: Test, db: Session): Promise<void> {
  for (const [name, use] of Object.entries(uses)) {
    const outcome = await Promise.resolve(use(db)).then(
      () => 'nothing',
      (error) => error.code,
    )
    t.equal(outcome, 'FST_REQUEST_DB_SESSION_ENDED', name)
  }
  t.equal(db.state, 'ended')
}

for (const used of [true, false]) {
  for (const end of ['answers', 'throws'] as const) {
    inBothModes(
      database,
      `a ${used ? 'used' : 'fresh'} session kept beyond a request that ${end}`,
      async (t, commitOn) => {
        let kept: FastifyRequest | undefined
        const app = await buildApp(t, database, { commitOn }, (app) => {
          app.get('/', async (request) => {
            kept = request
            if (used) await add(request.db, 'x')
            else t.equal(request.db.state, 'idle')
            if (end === 'throws') throw new Error('mine')
            return 'ok'
          })
        })
        for (const ask of [() => app.inject('/'), async () => (await openHttp(t, app)).send('GET', '/').response()]) {
          await ask()
          await holds(t, database, used && end === 'answers' ? ['x'] : [])
          await isRefused(t, kept!.db)
          t.equal(kept?.db.inTransaction, false)
          await database.query('delete from notes')
        }
        t.equal(app.db.snapshot().totals.checkouts, used ? 2 : 0)
      },
    )
  }
}

inBothModes(database, 'request.db that is first looked at after the end', async (t, commitOn) => {
  const requests: FastifyRequest[] = []
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get<{ Querystring: { fails?: string } }>('/', async (request) => {
      requests.push(request)
      if (request.query.fails) throw new Error('mine')
      return 'ok'
    })
  })
  await app.inject('/')
  await app.inject('/?fails=1')
  const client = await openHttp(t, app)
  await client.send('GET', '/').response()
  for (const request of requests) await isRefused(t, request.db)
  t.equal(app.db.snapshot().totals.checkouts, 0)
})

inBothModes(database, 'after `await reply` the session is ended', async (t, commitOn) => {
  const checked = gate()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      reply.send('sent')
      await reply
      // The answer has been written; under onResponse its commit may still be on the way, and is awaited.
      await isRefused(t, request.db)
      checked.open()
    })
  })
  t.equal((await app.inject('/')).body, 'sent')
  await checked.opened
  await holds(t, database, ['x'])
})

inBothModes(database, 'statements that nobody awaited when the handler returned', async (t, commitOn) => {
  const outcomes: Promise<string>[] = []
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get<{ Querystring: { note: string } }>('/', async (request) => {
      await sql`select 1`.execute(request.db)
      for (const note of ['a', 'b']) {
        outcomes.push(
          add(request.db, `${note}${request.query.note}`).then(
            () => `${note}${request.query.note}`,
            (error) => error.code,
          ),
        )
      }
      return 'ok'
    })
  })
  for (let note = 0; note < 5; note++) t.equal((await app.inject(`/?note=${note}`)).statusCode, 200)
  // A statement is in the request's own transaction, before its COMMIT, or it was refused.
  const written = (await Promise.all(outcomes)).filter((outcome) => outcome !== 'FST_REQUEST_DB_SESSION_ENDED')
  await holds(t, database, written)
  t.match(app.db.snapshot().totals, { commits: 5, opened: 1 })
})

inBothModes(database, 'a statement that nobody awaited and that fails', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 1 } }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      sql`select 1/0`.execute(request.db).catch(() => {})
      return 'ok'
    })
  })
  const { statusCode } = await app.inject('/')
  t.equal(statusCode, commitOn === 'onSend' ? 500 : 200)
  await holds(t, database, [])
})

inBothModes(database, 'a timer that fires after the answer', async (t, commitOn) => {
  const refused = gate<string>()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request) => {
      await add(request.db, 'x')
      setTimeout(() => add(request.db, 'late').catch((error) => refused.open(error.code)), 50)
      return 'ok'
    })
  })
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal(await refused.opened, 'FST_REQUEST_DB_SESSION_ENDED')
  await holds(t, database, ['x'])
  t.equal(app.db.snapshot().totals.checkouts, 1)
})

inBothModes(database, 'reply.send() that is not returned, with more work behind it', async (t, commitOn) => {
  const outcome = gate<string>()
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/', async (request, reply) => {
      await add(request.db, 'x')
      reply.send('sent')
      await add(request.db, 'late').then(
        () => outcome.open('written'),
        (error) => outcome.open(error.code),
      )
    })
  })
  t.match(await app.inject('/'), { statusCode: 200, body: 'sent' })
  const wrote = (await outcome.opened) === 'written'
  if (commitOn === 'onSend') t.notOk(wrote)
  await eventually(async () => (await notesIn(database)).length > 0)
  await holds(t, database, wrote ? ['x', 'late'] : ['x'])
})

inBothModes(database, 'parallel statements share one connection and one transaction', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn, pool: { size: 5 } }, (app) => {
    app.get('/', async (request) => {
      const pid = async () => (await sql<{ pid: number }>`select pg_backend_pid() pid`.execute(request.db)).rows[0]?.pid
      const pids = await Promise.all(Array.from({ length: 10 }, pid))
      await Promise.all(['1', '2', '3', '4', '5'].map((note) => add(request.db, note)))
      return { pids: new Set(pids).size }
    })
  })
  t.match((await app.inject('/')).json(), { pids: 1 })
  await holds(t, database, ['1', '2', '3', '4', '5'])
  t.match(app.db.snapshot().totals, { checkouts: 1, opened: 1, commits: 1 })
})
