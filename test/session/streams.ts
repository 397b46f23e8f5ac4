import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

// stream() as the handler uses it. What becomes of a stream that is the answer is a matter of the lifecycle's tests.

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const all = (db: Pick<Session, 'selectFrom'>) => db.selectFrom('notes').select(['id', 'note']).orderBy('id')
const portals = async (db: Session) =>
  (await sql<{ name: string }>`select name from pg_cursors`.execute(db)).rows.map(({ name }) => name)

t.beforeEach(async () => {
  await database.query('truncate notes restart identity')
  await database.query("insert into notes (note) select 'note ' || n from generate_series(1, 250) n")
})

test('a stream whose statement fails rejects with what PostgreSQL said', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const broken = db.selectFrom('notes').select(sql<number>`1 / 0`.as('n'))
    for await (const row of broken.stream(1)) t.fail('a row', row)
  })
  t.match((await post()).json(), { statusCode: 500, code: '22012' })
})

test('a stream that fails on its way gives the rows before that and then rejects', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const seen: number[] = []
    const broken = db.selectFrom('notes').select(sql<number>`10 / (3 - id)`.as('n')).orderBy('id')
    await t.rejects(
      async () => {
        for await (const { n } of broken.stream(1)) seen.push(n)
      },
      { code: '22012' },
    )
    t.strictSame(seen, [5, 10])
    t.equal(db.state, 'failed')
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
})

test('break after a row closes the cursor, and the session goes on', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for await (const { id } of all(db).stream(1)) {
      t.equal(id, 1)
      t.equal((await portals(db)).filter((name) => name !== '').length, 1)
      break
    }
    t.strictSame(
      (await portals(db)).filter((name) => name !== ''),
      [],
    )
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal((await notes()).at(-1), 'after')
})

test('a throw inside the loop closes the cursor; caught, the session goes on', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const read = async () => {
      for await (const { id } of all(db).stream(10)) if (id === 15) throw new Error('mine')
    }
    await t.rejects(read(), { message: 'mine' })
    t.strictSame(
      (await portals(db)).filter((name) => name !== ''),
      [],
    )
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal((await notes()).at(-1), 'after')
})

test('a throw inside the loop, not caught, rolls back', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for await (const { id } of all(db).stream(10)) {
      await insert(db, `row ${id}`)
      if (id === 15) throw new Error('mine')
    }
  })
  t.match((await post()).json(), { message: 'mine' })
  t.equal((await notes()).length, 250)
})

test('statements on the session inside the loop, between the chunks and within one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for await (const { id, note } of all(db).stream(10)) {
      if (id % 50 === 0)
        await db
          .updateTable('notes')
          .set({ note: `${note}!` })
          .where('id', '=', id)
          .execute()
    }
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(
    (await notes()).filter((note) => note.endsWith('!')),
    ['note 50!', 'note 100!', 'note 150!', 'note 200!', 'note 250!'],
  )
})

test('nested transactions and writes that are added inside the loop', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for await (const { id } of all(db).where('id', '<=', 20).stream(3)) {
      if (id % 10 === 0) db.add(db.insertInto('notes').values({ note: `added ${id}` }))
      if (id % 7 === 0) {
        await db
          .transaction()
          .execute(async (trx) => {
            await insert(trx, `nested ${id}`)
            if (id === 7) throw new Error('inner')
          })
          .catch(() => {})
      }
    }
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).slice(250).sort(), ['added 10', 'added 20', 'nested 14'])
})

test('streams side by side, and streams within streams', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const count = async () => {
      let n = 0
      for await (const _ of all(db).stream(7)) n++
      return n
    }
    t.strictSame(await Promise.all([count(), count(), count()]), [250, 250, 250])
    let pairs = 0
    for await (const { id } of all(db).where('id', '<=', 5).stream(1)) {
      for await (const inner of all(db).where('id', '<=', id).stream(2)) pairs += inner.id > 0 ? 1 : 0
    }
    return { pairs }
  })
  t.strictSame((await post()).json(), { pairs: 15 })
})

test('a stream in a nested transaction reads through its handle and the outer one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const counts = await db.transaction().execute(async (trx) => {
      await insert(trx, 'inside')
      let [mine, outer] = [0, 0]
      for await (const _ of all(trx).stream(100)) mine++
      for await (const _ of all(db).stream(100)) outer++
      return [mine, outer]
    })
    t.strictSame(counts, [251, 251])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('a stream begun outside waits while a nested transaction is open, and goes on behind it', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const iterator = all(db).stream(1)
    t.match(await iterator.next(), { value: { id: 1 } })
    const opened = gate()
    const goOn = gate()
    const nested = db.transaction().execute(async (trx) => {
      await insert(trx, 'inside')
      opened.open()
      await goOn.opened
      throw new Error('inner')
    })
    nested.catch(() => {})
    await opened.opened
    const next = iterator.next()
    goOn.open()
    await t.rejects(nested)
    t.match(await next, { value: { id: 2 } })
    await iterator.return?.()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal((await notes()).length, 250)
})

test('a stream begun in a nested transaction that failed is over', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    let stream: AsyncIterableIterator<{ id: number }> | undefined
    await t.rejects(
      db.transaction().execute(async () => {
        stream = all(db).stream(1)
        await stream.next()
        throw new Error('inner')
      }),
    )
    await t.rejects(async () => stream?.next())
    await stream?.return?.()
    await insert(db, 'after')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal((await notes()).at(-1), 'after')
})

test('a stream left open at the end of the request holds nothing up', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await all(db).stream(1).next()
    await insert(db, 'kept')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.equal((await notes()).at(-1), 'kept')
})

test('a stream that is read on after the end of the request is refused', async (t) => {
  let stream: AsyncIterableIterator<unknown> | undefined
  const { post, app } = await oneRoute(t, database, async (db) => {
    stream = all(db).stream(1)
    await stream.next()
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  const { checkouts } = app.db.snapshot().totals
  await t.rejects(async () => stream?.next(), { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  t.equal(app.db.snapshot().totals.checkouts, checkouts)
})

test('a stream after commit() by hand is over, a new one begins a new transaction', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const stream = all(db).stream(1)
    await stream.next()
    await db.commit()
    await t.rejects(async () => stream.next())
    await db.rollback()
    let n = 0
    for await (const _ of all(db).stream(100)) n++
    return { n }
  })
  t.strictSame((await post()).json(), { n: 250 })
})

test('a backend killed between two chunks: 503', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'gone')
    const { rows } = await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)
    for await (const { id } of all(db).stream(10)) {
      if (id === 15) await database.query('select pg_terminate_backend($1, 2000)', [rows[0]?.pid])
    }
  })
  t.match((await post()).json(), { statusCode: 503, code: 'FST_REQUEST_DB_CONNECTION_LOST' })
  t.equal((await notes()).length, 250)
})

test('a stream of a write that returns rows', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const written: string[] = []
    const query = db
      .insertInto('notes')
      .values([{ note: 'x' }, { note: 'y' }, { note: 'z' }])
      .returning('note')
    for await (const row of query.stream(1)) written.push((row as { note: string }).note)
    return written
  })
  t.strictSame((await post()).json(), ['x', 'y', 'z'])
  t.strictSame((await notes()).slice(250), ['x', 'y', 'z'])
})

test('a client that leaves while the loop waits for rows', async (t) => {
  const reading = gate()
  const ended = gate<unknown>()
  const { app } = await oneRoute(t, database, async (db) => {
    const slow = db.selectFrom('notes').select(sql<string>`pg_sleep(case id when 2 then 30 else 0 end)::text`.as('s'))
    const read = async () => {
      for await (const _ of slow.stream(1)) reading.open()
    }
    await read().then(ended.open, ended.open)
  })
  const controller = new AbortController()
  app.inject({ method: 'POST', url: '/', signal: controller.signal }).catch(() => {})
  await reading.opened
  controller.abort()
  t.match(await ended.opened, { code: /57014|SESSION_ENDED/ })
  await eventually(() => app.db.snapshot().checkedOut === 0)
})
