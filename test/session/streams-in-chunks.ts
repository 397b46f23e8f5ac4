import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// stream() as the handler uses it. What becomes of a stream that is the answer is a matter of the lifecycle's tests.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const all = (db: Pick<Session, 'selectFrom'>) => db.selectFrom('notes').select(['id', 'note']).orderBy('id')

t.beforeEach(async () => {
  await database.query('truncate notes restart identity')
  await database.query("insert into notes (note) select 'note ' || n from generate_series(1, 250) n")
})

for (const [chunkSize, fetches] of [
  [undefined, 3],
  [1, 251],
  [100, 3],
  [125, 3],
  [249, 2],
  [250, 2],
  [251, 1],
  [1000, 1],
] as const) {
  test(`a stream in chunks of ${chunkSize ?? 'no particular size'} reads every row once, in order`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
      const ids: number[] = []
      for await (const { id } of all(db).stream(chunkSize)) ids.push(id)
      return ids
    })
    t.strictSame(
      (await post()).json(),
      Array.from({ length: 250 }, (_, n) => n + 1),
    )
    t.equal(proxy.flights.length, fetches + 1)
    t.match(proxy.statements()[0], ['BEGIN', /^select/])
    t.strictSame(proxy.statements().at(-1), ['COMMIT'])
  })
}

test('a stream without rows ends at once', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for await (const row of all(db).where('id', '<', 0).stream(1)) t.fail('a row', row)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('a stream nobody reads sends nothing', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, (db) => {
    all(db).stream(1)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(proxy.statements(), [])
})

for (const chunkSize of [0, -1, 1.5, Number.NaN, Number.POSITIVE_INFINITY, '10' as unknown as number]) {
  test(`a chunk size of ${typeof chunkSize === 'string' ? `'${chunkSize}'` : chunkSize} is refused`, async (t) => {
    const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
      await insert(db, 'kept')
      await t.rejects(async () => {
        for await (const row of all(db).stream(chunkSize)) t.fail('a row', row)
      }, /chunkSize/)
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.equal(proxy.flights.length, 2)
  })
}

test('a stream in an autocommit session has a transaction of its own, and gives its connection back', async (t) => {
  const { post, proxy, app } = await oneRouteThroughProxy(
    t,
    database,
    async (db) => {
      let n = 0
      for await (const _ of all(db).stream(100)) n++
      t.equal(app.db.snapshot().checkedOut, 0)
      for await (const _ of all(db).stream(100)) break
      t.equal(app.db.snapshot().checkedOut, 0)
      return { n }
    },
    { route: { autocommit: true } },
  )
  t.strictSame((await post()).json(), { n: 250 })
  t.equal(
    proxy
      .statements()
      .flat()
      .filter((text) => text === 'BEGIN').length,
    2,
  )
})

test('statements inside the loop of a stream in an autocommit session are each their own', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      for await (const { id } of all(db).stream(10)) {
        if (id === 15) await insert(db, 'kept')
        if (id === 25) throw new Error('mine')
      }
    },
    { route: { autocommit: true }, pool: { size: 2 } },
  )
  t.match((await post()).json(), { message: 'mine' })
  t.equal((await notes()).at(-1), 'kept')
})
