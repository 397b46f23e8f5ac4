import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// Transaction commands that the handler sends past begin(), commit() and rollback().

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const raw = (db: Session, text: string) => sql.raw(text).execute(db)
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

for (const command of ['commit', 'rollback', 'end', 'abort', 'COMMIT WORK', ' /* c */ commit']) {
  test(`a raw ${command}, swallowed or not, makes the request an error, and nothing runs behind it`, async (t) => {
    const { post, app } = await oneRoute(
      t,
      database,
      async (db) => {
        await insert(db, 'before')
        await raw(db, command).catch(() => {})
        await t.rejects(insert(db, 'behind'))
        return 'went on'
      },
      { pool: { size: 1 } },
    )
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.notOk((await notes()).includes('behind'))
    t.equal((await post()).statusCode, 500)
    t.match(app.db.snapshot().totals, { opened: 1 })
  })
}

for (const command of ['commit', 'rollback']) {
  test(`a raw ${command} as the last statement makes the request an error`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'before')
      await raw(db, command)
      return 'ok'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  })

  test(`a raw ${command} inside a nested transaction makes the request an error`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await db
        .transaction()
        .execute(async () => {
          await insert(db, 'inside')
          await raw(db, command)
          await insert(db, 'behind')
        })
        .catch(() => {})
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.notOk((await notes()).includes('behind'))
  })

  test(`a raw ${command} as the first statement makes the request an error`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await raw(db, command).catch(() => {})
      await insert(db, 'behind').catch(() => {})
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.strictSame(await notes(), [])
  })

  test(`after a raw ${command} the handler's rollback() makes the session usable again`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'before')
      await raw(db, command).catch(() => {})
      t.equal(db.state, 'failed')
      await db.rollback()
      await insert(db, 'after')
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.equal((await notes()).at(-1), 'after')
  })

  test(`a raw ${command} and chain is an error too: the server stays in a transaction, but not in ours`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'before')
      await raw(db, `${command} and chain`).catch(() => {})
      await insert(db, 'behind').catch(() => {})
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.notOk((await notes()).includes('behind'))
  })

  test(`a raw ${command} through the raw client makes the request an error`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      await insert(db, 'before')
      await db.withClient((client) => client.query(command))
      await t.rejects(insert(db, 'behind'), { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
      return 'went on'
    })
    t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
    t.notOk((await notes()).includes('behind'))
  })
}

test('a raw begin inside the transaction changes nothing', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'before')
    await raw(db, 'begin')
    await insert(db, 'behind')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['before', 'behind'])
})

test("raw savepoints are the handler's own business", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'before')
    await raw(db, 'savepoint mine')
    await t.rejects(raw(db, 'select 1 / 0'))
    t.equal(db.state, 'failed')
    await raw(db, 'rollback to savepoint mine')
    t.equal(db.state, 'begun')
    await raw(db, 'release mine')
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['before', 'after'])
})

test('several statements in one text are refused by the protocol, none of them runs', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'before')
    await t.rejects(raw(db, "commit; insert into notes (note) values ('behind')"), { code: '42601' })
    return 'went on'
  })
  t.equal((await post()).statusCode, 500)
  t.strictSame(await notes(), [])
})

test('a raw begin in an autocommit session leaves nothing open', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await raw(db, 'begin').catch(() => {})
      await insert(db, 'A').catch(() => {})
      return 'went on'
    },
    { route: { autocommit: true }, pool: { size: 1 } },
  )
  await post()
  await post()
  t.pass('what matters is that nothing is left, which is asserted after this')
})

test('a function that ends the transaction is refused by the server', async (t) => {
  await database.query('create procedure commits() language plpgsql as $$ begin commit; end $$')
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'before')
    await raw(db, 'call commits()')
    return 'not reached'
  })
  t.match((await post()).json(), { statusCode: 500, code: '2D000' })
  t.strictSame(await notes(), [])
})
