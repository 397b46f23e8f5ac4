import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: `${NOTES}; create unique index notes_once on notes (note)` })
const add = (db: Session, ...notes: string[]) => {
  for (const note of notes) db.add(db.insertInto('notes').values({ note }))
}
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('a nested transaction takes along what was added in it, and drops it when it fails', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    add(db, 'outer')
    await db.transaction().execute(async () => add(db, 'kept'))
    await t.rejects(
      db.transaction().execute(async () => {
        add(db, 'dropped')
        throw new Error('inner')
      }),
    )
    add(db, 'last')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['outer', 'kept', 'last'])
  t.match(proxy.statements().slice(0, 2), [
    ['BEGIN', /^insert/, /^SAVEPOINT/],
    [/^insert/, /^RELEASE/],
  ])
  t.equal(
    proxy
      .statements()
      .flat()
      .filter((text) => text.startsWith('insert')).length,
    3,
    'the dropped one never left',
  )
})

test('what was added before a nested transaction is not lost with it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'before')
    await t.rejects(
      db.transaction().execute(async (trx) => {
        await insert(trx, 'inside')
        throw new Error('inner')
      }),
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['before'])
})

test('a write added in a nested transaction that fails takes that along and no more', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    const nested = db.transaction().execute(async () => {
      add(db, 'b', 'a', 'c')
      return 'the callback found nothing wrong'
    })
    t.match(await nested.catch((error: unknown) => error), { code: '23505' })
    add(db, 'd')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'd'])
})

test('flush in a nested transaction sends its own and rejects with their failure', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'a')
    await db.transaction().execute(async () => {
      add(db, 'b')
      await db.flush()
    })
    await t.rejects(
      db.transaction().execute(async () => {
        add(db, 'a')
        await db.flush()
      }),
      { code: '23505' },
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b'])
})

test('what was added leaves before a stream, and before the raw client is handed out', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a')
    const streamed: string[] = []
    for await (const { note } of db.selectFrom('notes').select('note').stream(1)) streamed.push(note)
    t.strictSame(streamed, ['a'])
    add(db, 'b')
    const { rows } = await db.withClient((client) => client.query('select count(*)::int as n from notes'))
    t.strictSame(rows, [{ n: 2 }])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'b'])
})

test('withClient rejects, without calling, when what was added fails', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a', 'a')
    await t.rejects(
      db.withClient(async () => t.fail('the client was handed out')),
      { code: /23505|TRANSACTION_ABORTED/ },
    )
    return 'went on'
  })
  t.equal((await post()).statusCode, 500)
  t.strictSame(await notes(), [])
})

test('what was added in an autocommit session is kept write by write', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      add(db, 'a')
      await db.selectFrom('notes').selectAll().execute()
      t.strictSame(await notes(), ['a'])
      add(db, 'b', 'a', 'c')
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  t.match((await post()).json(), { statusCode: 500, code: '23505' })
  t.strictSame(await notes(), ['a', 'b', 'c'])
  t.notOk(proxy.statements().flat().includes('BEGIN'))
})

test('flush in an autocommit session rejects with the first write that failed, and the rest is kept', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      add(db, 'a', 'a', 'c')
      await t.rejects(db.flush(), { code: '23505' })
      return 'told by flush()'
    },
    { route: { autocommit: true } },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['a', 'c'])
})

test('of a write that failed in an autocommit session nobody says that nothing was kept', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    (db) => {
      add(db, 'a', 'a')
      return 'ok'
    },
    { route: { autocommit: true } },
  )
  const { message } = (await post()).json()
  t.match(message, /^Deferred write 2 failed with 23505/)
  t.notMatch(message, /nothing was kept/)
})

test('flush and statements side by side: every write is sent once', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db, 'a')
    await Promise.all([db.flush(), insert(db, 'b'), db.flush()])
    add(db, 'c')
    await Promise.all([insert(db, 'd'), db.flush()])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['a', 'b', 'c', 'd'])
})
