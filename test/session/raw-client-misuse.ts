import { sql } from 'kysely'
import type pg from 'pg'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test("a query of the client's that nobody awaits belongs to withClient", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient(async (client) => {
      client.query("insert into notes (note) values ('A')")
    })
    const seen = await db.selectFrom('notes').select('note').orderBy('id').execute()
    t.strictSame(seen, [{ note: 'A' }], 'the rows reach the statement that asked for them')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test("a query of the client's that nobody awaits and that fails fails the request", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient(async (client) => {
      client.query('select 1 / 0').catch(() => {})
    })
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await notes(), [])
})

test('a client kept beyond fn is refused, and does no harm to whoever has the connection next', async (t) => {
  let escaped: pg.Client | undefined
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await db.withClient(async (client) => {
        escaped ??= client
      })
      return sql`select 'mine' as whose`.execute(db)
    },
    { pool: { size: 1 } },
  )
  t.match((await post()).json(), { rows: [{ whose: 'mine' }] })
  const late = async () => escaped?.query("select 'late' as whose")
  await t.rejects(late())
  const answers = await Promise.allSettled([post(), late(), post()])
  t.match(answers[0], { value: { statusCode: 200 } })
  t.match(answers[2], { value: { statusCode: 200 } })
  t.match((await post()).json(), { rows: [{ whose: 'mine' }] })
  t.equal(app.db.snapshot().checkedOut, 0)
})

test("a part of fn that goes on after fn has failed is refused, and reads nobody else's rows", async (t) => {
  const goOn = gate()
  const late = gate<unknown>()
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      const failing = db.withClient((client) => {
        const straggler = async () => {
          await goOn.opened
          return client.query("select 'late' as whose")
        }
        straggler().then(late.open, late.open)
        return Promise.reject(new Error('the other part'))
      })
      await t.rejects(failing, { message: 'the other part' })
      goOn.open()
      return sql`select 'mine' as whose`.execute(db)
    },
    { pool: { size: 1 } },
  )
  t.match((await post()).json(), { rows: [{ whose: 'mine' }] })
  t.ok((await late.opened) instanceof Error)
  t.equal(app.db.snapshot().checkedOut, 0)
})

for (const where of ['between its queries', 'during a query'] as const) {
  test(`the connection is killed inside fn, ${where}`, async (t) => {
    const { post, app } = await oneRoute(t, database, async (db) => {
      await insert(db, 'A')
      await db.withClient(async (client) => {
        const { rows } = await client.query('select pg_backend_pid() as pid')
        const kill = () => database.query('select pg_terminate_backend($1, 2000)', [rows[0].pid])
        if (where === 'during a query') {
          await Promise.all([client.query('select pg_sleep(30)'), kill()])
        } else {
          await kill()
          await client.query('select 1')
        }
      })
      return 'not reached'
    })
    const answer = await post()
    t.match(answer.json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
    t.strictSame(await notes(), [])
    await eventually(() => app.db.snapshot().open === 0)
  })
}

test('the connection is killed inside fn, which swallows it: 503 all the same', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await db
      .withClient(async (client) => {
        const { rows } = await client.query('select pg_backend_pid() as pid')
        await database.query('select pg_terminate_backend($1, 2000)', [rows[0].pid])
        await client.query('select 1').catch(() => {})
      })
      .catch(() => {})
    await t.rejects(insert(db, 'B'), { code: 'FST_REQUEST_DB_CONNECTION_LOST' })
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
})

test('a withClient nobody awaits, still open when the handler returns: 500, nothing kept, connection gone', async (t) => {
  const goOn = gate()
  const ended = gate<unknown>()
  const { post, app } = await oneRoute(t, database, async (db) => {
    const inside = gate()
    db.withClient(async (client) => {
      await client.query("insert into notes (note) values ('A')")
      inside.open()
      await goOn.opened
      await client.query("insert into notes (note) values ('B')")
    }).then(ended.open, ended.open)
    await inside.opened
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.equal(app.db.snapshot().checkedOut, 0)
  goOn.open()
  t.ok((await ended.opened) instanceof Error)
  t.strictSame(await notes(), [])
})

test('a client that leaves while fn runs: the statement of the raw client is cancelled or its connection cut', async (t) => {
  const sleeping = gate()
  const ended = gate<unknown>()
  const { app } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await db
      .withClient(async (client) => {
        const query = client.query('select pg_sleep(30)')
        sleeping.open()
        await query
      })
      .then(ended.open, ended.open)
  })
  const controller = new AbortController()
  app.inject({ method: 'POST', url: '/', signal: controller.signal }).catch(() => {})
  await sleeping.opened
  controller.abort()
  t.ok((await ended.opened) instanceof Error)
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.strictSame(await notes(), [])
})

test('fn that changes what the session stands on: what it leaves behind is found out', async (t) => {
  const { post, app } = await oneRoute(
    t,
    database,
    async (db) => {
      await db.withClient(async (client) => {
        await client.query('rollback')
        await client.query('begin isolation level serializable')
        await client.query("insert into notes (note) values ('A')")
      })
      return 'ok'
    },
    { pool: { size: 1 } },
  )
  t.equal((await post()).statusCode, 200, 'a transaction is open, and that is what is committed')
  t.strictSame(await notes(), ['A'])
  t.equal(app.db.snapshot().checkedOut, 0)
})

test('fn that ends the client: the connection is gone, and the session says so', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await db.withClient((client) => client.end()).catch(() => {})
    await insert(db, 'B').catch(() => {})
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.strictSame(await notes(), [])
})
