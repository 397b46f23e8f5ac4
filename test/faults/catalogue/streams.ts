import { Readable } from 'node:stream'
import { sql } from 'kysely'
import type { Session } from '../../../lib/index.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { openHttp } from '../../support/http-client.ts'
import { add } from '../../support/notebook.ts'
import { PROTOCOLS, scenario } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* Answers that read from a cursor. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, {
  sql: `${NOTES}; create table many (n int primary key, text text);
    insert into many select n, repeat('x', 1000) from generate_series(1, 20000) n`,
})

/** What a scenario streams: `last` rows of 1 kB; calls `onRow` before each. */
async function* rowsOf(db: Session, last: number, onRow: (n: number) => unknown = () => {}) {
  const many = db.withTables<{ many: { n: number; text: string } }>()
  for await (const row of many.selectFrom('many').selectAll().where('n', '<=', last).orderBy('n').stream(50)) {
    await onRow(row.n)
    yield `${row.n} ${row.text}\n`
  }
}

for (const isBegun of [false, true]) {
  scenario(database, `74 a stream fed by a cursor${isBegun ? ', begun in the handler' : ''}`, async (scene) => {
    await scene.open({
      handler: async (db) => {
        await add(db, 'kept')
        const rows = rowsOf(db, 300)
        const first = isBegun ? [(await rows.next()).value as string] : []
        return Readable.from(
          (async function* () {
            yield* first
            yield* rows
          })(),
        )
      },
    })
    const answer = await scene.post()
    scene.t.equal(answer.body.split('\n').length, 301)
    await eventually(() => scene.proxy.statements().flat().at(-1) === 'COMMIT')
    return { answers: [answer], expected: [200], rows: ['kept'], connection: 'reused' }
  })
}

scenario(database, '75 the stream fails midway', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      return Readable.from(
        rowsOf(db, 300, (n) => {
          if (n === 200) throw new Error('mine')
        }),
      )
    },
  })
  const guest = await scene.guest()
  guest.send('POST', '/')
  const answers = [await guest.answer()]
  return { answers, expected: ['none'], rows: [], connection: 'reused', totals: { commits: 0 } }
})

for (const protocol of PROTOCOLS) {
  for (const method of ['GET', 'POST'] as const) {
    scenario(database, `76 the client leaves midway, ${method} over ${protocol}`, async (scene) => {
      const closed = gate()
      await scene.open({
        ...(protocol === 'HTTP/2' && { fastify: { http2: true } }),
        routes: (app) => {
          app.route({
            method,
            url: '/rows',
            handler: async ({ db }) => {
              await add(db, 'lost')
              const rows = async function* () {
                try {
                  yield* rowsOf(db, 20_000, (n) => n === 1000 && scene.reached.open(1))
                } finally {
                  closed.open()
                }
              }
              return Readable.from(rows())
            },
          })
        },
      })
      const guest = await scene.guest(protocol)
      guest.send(method, '/rows', method === 'POST' ? {} : undefined)
      await scene.reached.opened
      guest.leave()
      await closed.opened
      return { answers: [], expected: [], rows: [], totals: { commits: 0 } }
    })
  }
}

scenario(
  database,
  '77 a reader that stops is cut after maxSessionMillis, and others are served meanwhile',
  async (scene) => {
    await scene.open({
      pool: { size: 2 },
      maxSessionMillis: 1000,
      routes: (app) => {
        app.get('/rows', async ({ db }) => {
          await add(db, 'lost')
          return Readable.from(rowsOf(db, 20_000))
        })
        app.post('/other', async ({ db }) => {
          await sql`select 1`.execute(db)
          return 'served'
        })
      },
    })
    const slow = (await openHttp(scene.t, scene.app)).send('GET', '/rows')
    await slow.receives('200 OK')
    slow.pause()
    const others = []
    const isHeld = () => scene.app.db.snapshot().holders.some(({ route }) => route === '/rows')
    while (isHeld()) others.push(await scene.post('/other'))
    const statuses = new Set(others.map(({ status }) => status))
    scene.t.strictSame([...statuses], [200])
    slow.resume()
    await eventually(() => slow.closed)
    return { answers: [], expected: [], rows: [], totals: { timeouts: 0 } }
  },
)

scenario(database, '79 a loop that breaks off after one row', async (scene) => {
  await scene.open({
    handler: async (db) => {
      for await (const row of rowsOf(db, 300)) {
        if (row !== '') break
      }
      await add(db, 'kept')
      const { rows } = await sql`select name from pg_cursors where name <> ''`.execute(db)
      return rows.length
    },
  })
  const answer = await scene.post()
  scene.t.equal(answer.body, '0', 'the cursor is closed')
  return { answers: [answer], expected: [200], rows: ['kept'], connection: 'reused' }
})
