import { setImmediate as turnOfTheLoop } from 'node:timers/promises'
import { sql } from 'kysely'
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

// Kysely refuses its own handles before we see them.
const REFUSALS = /nested transaction has ended|already (committed|rolled back)/

t.beforeEach(() => database.query('truncate notes restart identity'))

for (const begunBefore of [true, false]) {
  const when = begunBefore ? 'in a transaction that is open' : 'as the first thing of a session'
  test(`of nested transactions side by side, ${when}, exactly the fulfilled ones are kept`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      if (begunBefore) await insert(db, 'before')
      const settled = await Promise.allSettled(
        Array.from({ length: 10 }, (_, n) =>
          db.transaction().execute(async (trx) => {
            await insert(trx, `${n} first`)
            if (n % 3 === 0) throw new Error(`${n}`)
            await turnOfTheLoop()
            await insert(db, `${n} second`)
            if (n % 3 === 1) await sql`select 1 / 0`.execute(trx)
          }),
        ),
      )
      return settled.map(({ status }) => status === 'fulfilled')
    })
    const fulfilled = (await post()).json() as boolean[]
    t.strictSame(
      fulfilled,
      [0, 1, 2, 3, 4, 5, 6, 7, 8, 9].map((n) => n % 3 === 2),
    )
    const expected = [2, 5, 8].flatMap((n) => [`${n} first`, `${n} second`])
    t.strictSame(new Set(await notes()), new Set(begunBefore ? ['before', ...expected] : expected))
  })
}

test('statements beside failing nested transactions are kept, every one', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    await Promise.allSettled(
      Array.from({ length: 12 }, (_, n) =>
        n % 2 === 0
          ? insert(db, `${n} outside`)
          : db.transaction().execute(async (trx) => {
              await insert(trx, `${n} inside`)
              throw new Error('inner')
            }),
      ),
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['0 outside', '10 outside', '2 outside', '4 outside', '6 outside', '8 outside'])
})

test('a statement from outside is not sent while a nested transaction is open', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    const opened = gate()
    const goOn = gate()
    const nested = db.transaction().execute(async (trx) => {
      await insert(trx, 'inside')
      opened.open()
      await goOn.opened
      await insert(trx, 'inside again')
      throw new Error('inner')
    })
    nested.catch(() => {})
    await opened.opened
    const outside = insert(db, 'outside')
    const another = db.transaction().execute((trx) => insert(trx, 'another'))
    await database.query('select 1')
    t.equal(proxy.flights.length, 2, 'it waits its turn')
    goOn.open()
    await t.rejects(nested, { message: 'inner' })
    await Promise.all([outside, another])
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame((await notes()).sort(), ['another', 'outside'])
  t.match(proxy.statements().slice(0, 4), [
    ['BEGIN', /^SAVEPOINT/],
    [/^insert/],
    [/^insert/],
    [/^ROLLBACK TO/, /^RELEASE/],
  ])
})

for (const [what, act] of [
  ['commit()', (db: Session) => db.commit()],
  ['rollback()', (db: Session) => db.rollback()],
] as const) {
  test(`${what} from outside waits for the nested transaction that is open`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      const opened = gate()
      const goOn = gate()
      const nested = db.transaction().execute(async (trx) => {
        await insert(trx, 'inside')
        opened.open()
        await goOn.opened
        await insert(trx, 'inside again')
      })
      await opened.opened
      const ended = act(db)
      await database.query('select 1')
      goOn.open()
      await nested
      await ended
      t.equal(db.state, 'idle')
      throw new Error('mine')
    })
    t.match((await post()).json(), { message: 'mine' })
    t.strictSame(await notes(), what === 'commit()' ? ['inside', 'inside again'] : [])
  })
}

test('a statement that waits for the nested transaction that waits for it is refused in time', async (t) => {
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const inside = gate()
      // Its chain of awaits began outside, so it is not of the nested transaction, although that awaits it.
      const outside = inside.opened.then(() => insert(db, 'outside'))
      await db.transaction().execute(async (trx) => {
        await insert(trx, 'inside')
        inside.open()
        await outside
      })
      return 'not reached'
    },
    { pool: { timeoutMillis: 200 } },
  )
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.strictSame(await notes(), [])
})

test('what is left of a nested transaction that has failed is refused, through either handle', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const failed = gate()
    const late: Promise<unknown>[] = []
    await t.rejects(
      db.transaction().execute(async (trx) => {
        await insert(trx, 'inside')
        late.push(failed.opened.then(() => insert(trx, 'late, trx')))
        late.push(failed.opened.then(() => insert(db, 'late, db')))
        late.push(failed.opened.then(() => db.transaction().execute((trx) => insert(trx, 'late, nested'))))
        for (const one of late) one.catch(() => {})
        throw new Error('inner')
      }),
    )
    failed.open()
    for (const { status, ...rest } of await Promise.allSettled(late)) {
      t.equal(status, 'rejected')
      t.match(rest, { reason: { message: REFUSALS } })
    }
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), [])
})

test('a straggler of a failed nested transaction is refused also while that is being rolled back', async (t) => {
  const { post, proxy } = await oneRouteThroughProxy(t, database, async (db) => {
    await insert(db, 'before')
    const failing = gate()
    const answerHeld = proxy.trap({ from: 'server', type: 'C', text: /^ROLLBACK/ }, 'hold')
    let late: Promise<PromiseSettledResult<unknown>[]> | undefined
    const nested = db.transaction().execute(() =>
      Promise.all([
        insert(db, 'inside').then(() => {
          failing.open()
          throw new Error('one part')
        }),
        answerHeld.sprung.then(() => {
          late = Promise.allSettled([
            insert(db, 'straggler'),
            db.transaction().execute(() => insert(db, 'nested straggler')),
          ])
          t.throws(() => db.add(db.insertInto('notes').values({ note: 'added straggler' })), {
            code: 'FST_REQUEST_DB_NESTED_CONFLICT',
          })
        }),
      ]),
    )
    await failing.opened
    await answerHeld.sprung
    await database.query('select 1')
    answerHeld.release()
    await t.rejects(nested, { message: 'one part' })
    t.strictSame(
      (await late)?.map(({ status }) => status),
      ['rejected', 'rejected'],
    )
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['before'])
})

test('an inner transaction nobody awaited is refused as soon as the outer one fails', async (t) => {
  const { post } = await oneRoute(t, database, async (db) => {
    const ended = gate<unknown>()
    await t.rejects(
      db.transaction().execute(async () => {
        const inserted = gate()
        db.transaction()
          .execute(async () => {
            for (let n = 0; n < 50; n++) {
              await insert(db, `inner ${n}`)
              inserted.open()
            }
          })
          .then(ended.open, ended.open)
        await inserted.opened
        throw new Error('outer')
      }),
      { message: 'outer' },
    )
    t.ok((await ended.opened) instanceof Error)
    return 'ok'
  })
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), [])
})

for (const outcome of ['succeeded', 'failed'] as const) {
  test(`the handle of a nested transaction that has ${outcome} is of no use outside of it`, async (t) => {
    const { post } = await oneRoute(t, database, async (db) => {
      let escaped: Pick<Session, 'insertInto'> | undefined
      await db
        .transaction()
        .execute(async (trx) => {
          escaped = trx
          await insert(trx, 'inside')
          if (outcome === 'failed') throw new Error('inner')
        })
        .catch(() => {})
      await t.rejects(insert(escaped as Session, 'after the end'), { message: REFUSALS })
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.strictSame(await notes(), outcome === 'succeeded' ? ['inside'] : [])
  })
}

test('a nested transaction that is still open when the handler returns: 500 and nothing kept', async (t) => {
  const goOn = gate()
  const ended = gate<unknown>()
  const { post } = await oneRoute(t, database, async (db) => {
    const opened = gate()
    await insert(db, 'A')
    db.transaction()
      .execute(async (trx) => {
        await insert(trx, 'B')
        opened.open()
        await goOn.opened
        await insert(trx, 'C')
      })
      .then(ended.open, ended.open)
    await opened.opened
    return 'ok'
  })
  t.match((await post()).json(), { statusCode: 500, code: 'FST_REQUEST_DB_NESTED_CONFLICT' })
  t.strictSame(await notes(), [])
  goOn.open()
  t.match(await ended.opened, { code: /SESSION_ENDED|NESTED_CONFLICT/ })
  t.strictSame(await notes(), [])
})

test('a nested transaction nobody awaits, begun as the handler returns, is kept whole or not at all', async (t) => {
  const ended = gate<unknown>()
  const { post } = await oneRoute(t, database, async (db) => {
    await insert(db, 'A')
    db.transaction()
      .execute(async (trx) => {
        await insert(trx, 'B')
        await insert(trx, 'C')
      })
      .then(ended.open, ended.open)
    return 'ok'
  })
  const { statusCode } = await post()
  const error = await ended.opened
  const kept = await notes()
  if (statusCode !== 200) t.strictSame(kept, [])
  else t.strictSame(kept, error === undefined ? ['A', 'B', 'C'] : ['A'])
})

test('a cancelled wait leaves nobody behind: the client goes while a sibling waits its turn', async (t) => {
  const opened = gate()
  const refused = gate<unknown>()
  const { app } = await oneRoute(t, database, async (db, request) => {
    const nested = db.transaction().execute(async (trx) => {
      await insert(trx, 'inside')
      opened.open()
      await new Promise(() => {})
    })
    nested.catch(() => {})
    await opened.opened
    await insert(db, 'waits').then(refused.open, refused.open)
    return request.id
  })
  const controller = new AbortController()
  app.inject({ method: 'POST', url: '/', signal: controller.signal }).catch(() => {})
  await opened.opened
  await eventually(() => app.db.snapshot().checkedOut === 1)
  controller.abort()
  t.match(await refused.opened, { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.strictSame(await notes(), [])
})
