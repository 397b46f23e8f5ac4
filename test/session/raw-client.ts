import { sql } from 'kysely'
import pg from 'pg'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { oneRoute, oneRouteThroughProxy } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)
const pidOf = async (db: Session) =>
  (await sql<{ pid: number }>`select pg_backend_pid() as pid`.execute(db)).rows[0]?.pid

t.beforeEach(() => database.query('truncate notes restart identity'))

test("withClient hands out pg's own client, in the transaction and on the connection of the session", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    const pid = await pidOf(db)
    const result = await db.withClient(async (client) => {
      t.ok(client instanceof pg.Client)
      const { rows } = await client.query('select pg_backend_pid() as pid, count(*)::int as notes from notes')
      t.strictSame(rows, [{ pid, notes: 1 }])
      await client.query("insert into notes (note) values ('B')")
      return 'what fn returns'
    })
    t.equal(result, 'what fn returns')
    await insert(db, 'C')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B', 'C'])
})

test('withClient as the first thing of a session begins its transaction', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await db.withClient((client) => client.query("insert into notes (note) values ('A')"))
    throw new Error('mine')
  })
  t.match((await post()).json(), { message: 'mine' })
  t.strictSame(await notes(), [])
  t.strictSame(proxy.statements()[0], ['BEGIN'])
  await eventually(() => proxy.flights.at(-1)?.statements[0] === 'ROLLBACK')
})

test('a script of several statements', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const results = await db.withClient((client) =>
      client.query(
        "insert into notes (note) values ('A'); insert into notes (note) values ('B'); select count(*)::int as n from notes",
      ),
    )
    t.match(results, [{ command: 'INSERT' }, { command: 'INSERT' }, { rows: [{ n: 2 }] }])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
})

test('a script that fails half-way fails the request and keeps nothing', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient((client) => client.query("insert into notes (note) values ('A'); select 1 / 0"))
    return 'not reached'
  })
  t.match((await post()).json(), { statusCode: 500, code: '22012' })
  t.strictSame(await notes(), [])
})

test('a script that fails, swallowed: TRANSACTION_ABORTED instead of a 200 with nothing kept', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    await t.rejects(
      db.withClient((client) => client.query('select 1 / 0')),
      { code: '22012' },
    )
    t.equal(db.state, 'failed')
    return 'went on'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_TRANSACTION_ABORTED' })
  t.strictSame(await notes(), [])
})

test('what fn throws, in time or at once, reaches the handler, and the session goes on', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const later = async (client: pg.Client) => {
      await client.query("insert into notes (note) values ('A')")
      throw new RangeError('later')
    }
    const atOnce = () => {
      throw new RangeError('at once')
    }
    await t.rejects(db.withClient(later), { message: 'later' })
    await t.rejects(db.withClient(atOnce), { message: 'at once' })
    const nothing = (() => {}) as unknown as () => Promise<void>
    t.equal(await db.withClient(nothing), undefined)
    await insert(db, 'B')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
})

/** Feeds a COPY FROM STDIN the way pg-copy-streams does: a query of pg's that answers CopyInResponse with rows. */
class CopyIn {
  readonly done: Promise<void>
  readonly #text: string
  readonly #lines: string[]
  #resolve: () => void = () => {}
  #reject: (error: Error) => void = () => {}

  constructor(text: string, lines: string[]) {
    this.#text = text
    this.#lines = lines
    this.done = new Promise((resolve, reject) => {
      this.#resolve = resolve
      this.#reject = reject
    })
  }

  submit(connection: { query(text: string): void }): void {
    connection.query(this.#text)
  }

  handleCopyInResponse(connection: { sendCopyFromChunk(chunk: Buffer): void; endCopyFrom(): void }): void {
    for (const line of this.#lines) connection.sendCopyFromChunk(Buffer.from(`${line}\n`))
    connection.endCopyFrom()
  }

  handleCommandComplete(): void {}

  handleError(error: Error): void {
    this.#reject(error)
  }

  handleReadyForQuery(): void {
    this.#resolve()
  }
}

test('COPY FROM STDIN through the raw client', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    add(db)
    await db.withClient(async (client) => {
      const copy = new CopyIn(
        'copy notes (note) from stdin',
        Array.from({ length: 1000 }, (_, n) => `line ${n}`),
      )
      client.query(copy as unknown as pg.Submittable)
      await copy.done
    })
    return db
      .selectFrom('notes')
      .select(({ fn }) => fn.countAll<string>().as('n'))
      .executeTakeFirst()
  })
  const add = (db: Session) => db.add(db.insertInto('notes').values({ note: 'before' }))
  t.strictSame((await post()).json(), { n: '1001' })
  t.equal((await notes()).length, 1001)
})

test('a COPY that the server refuses', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient(async (client) => {
      const copy = new CopyIn('copy notes (id, note) from stdin', ['not a number\tx'])
      client.query(copy as unknown as pg.Submittable)
      await copy.done
    })
  })
  t.match((await post()).json(), { statusCode: 500, code: '22P02' })
  t.strictSame(await notes(), [])
})

test('LISTEN and NOTIFY through the raw client', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const heard = gate<string | undefined>()
    await db.withClient(async (client) => {
      const listener = ({ payload }: pg.Notification) => heard.open(payload)
      client.once('notification', listener)
      await client.query('listen news')
      await client.query('commit')
      await database.query("select pg_notify('news', 'something happened')")
      await client.query('begin')
      t.equal(await heard.opened, 'something happened')
      await client.query('unlisten news')
    })
    await insert(db, 'A')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})

test("a cursor by pg's own means", async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    for (const note of ['A', 'B', 'C']) await insert(db, note)
    const fetched: string[] = []
    await db.withClient(async (client) => {
      await client.query('declare mine cursor for select note from notes order by id')
      for (
        let row = await client.query('fetch 1 from mine');
        row.rows.length > 0;
        row = await client.query('fetch 1 from mine')
      ) {
        fetched.push(row.rows[0].note)
      }
      await client.query('close mine')
    })
    return fetched
  })
  t.strictSame((await post()).json(), ['A', 'B', 'C'])
})

test('a statement on request.db inside fn is refused at once', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db.withClient(async (client) => {
      const refused = { code: 'FST_REQUEST_DB_NESTED_CONFLICT' }
      await t.rejects(insert(db, 'x'), refused)
      await t.rejects(
        db.transaction().execute(async () => {}),
        refused,
      )
      await t.rejects(
        db.withClient(async () => {}),
        refused,
      )
      await t.rejects(db.commit(), refused)
      await t.rejects(db.rollback(), refused)
      t.throws(() => db.add(db.insertInto('notes').values({ note: 'x' })), refused)
      await client.query("insert into notes (note) values ('A')")
    })
    await insert(db, 'B')
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A', 'B'])
})

test('statements from beside fn wait until it is done, and so does a second withClient', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const inside = gate()
    const goOn = gate()
    const first = db.withClient(async (client) => {
      await client.query("insert into notes (note) values ('A')")
      inside.open()
      await goOn.opened
      await client.query("insert into notes (note) values ('B')")
    })
    await inside.opened
    const flights = proxy.flights.length
    const waiting = Promise.all([
      insert(db, 'C'),
      db.withClient((client) => client.query("insert into notes (note) values ('D')")),
      db.transaction().execute((trx) => insert(trx, 'E')),
    ])
    await database.query('select 1')
    t.equal(proxy.flights.length, flights)
    goOn.open()
    await Promise.all([first, waiting])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).slice(0, 2), ['A', 'B'])
  t.strictSame((await notes()).sort(), ['A', 'B', 'C', 'D', 'E'])
})

test('statements under way when withClient is called are answered first', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const [first, second] = await Promise.all([
      sql`select 'statement' as who from pg_sleep(0.05)`.execute(db),
      db.withClient((client) => client.query("select 'client' as who")),
    ])
    t.match([first.rows, second.rows], [[{ who: 'statement' }], [{ who: 'client' }]])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
})

test('withClient inside a nested transaction belongs to that', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await db
      .transaction()
      .execute(() => db.withClient((client) => client.query("insert into notes (note) values ('A')")))
    await t.rejects(
      db.transaction().execute(async () => {
        await db.withClient((client) => client.query("insert into notes (note) values ('B')"))
        throw new Error('inner')
      }),
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['A'])
})
