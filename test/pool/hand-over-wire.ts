import { setTimeout as moment, setImmediate as turn } from 'node:timers/promises'
import { sql } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { HttpClient, listen } from '../support/http-client.ts'
import { MODES } from '../support/modes.ts'
import { nothingIsLeft } from '../support/nothing-left.ts'
import type { Recording } from '../support/recorder.ts'
import { buildRelay, RELAY } from '../support/relay.ts'
import { t, test } from '../support/test.ts'

// What each connection has seen, read as sentences: BEGIN … COMMIT or BEGIN … ROLLBACK, each of one request alone.

const database = await createDatabase(t, { sql: RELAY })

const REQUESTS = 800
const USERS = 10

/** Reproducible chance. */
function dice(seed: number): () => number {
  let state = seed
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648
    return state / 2_147_483_648
  }
}

// The request's number is in the text of the statement, where the proxy can read it.
const write = (n: number) => sql.raw(`insert into notes (note) values ('#${n}')`)
const bad = (db: Session) => db.insertInto('notes').values({ note: null as unknown as string })

/** The ways of a request; each writes, or asks, under its own number only. */
const WAYS: ((db: Session, n: number) => unknown)[] = [
  (db, n) => write(n).execute(db),
  (db, n) => Promise.all([write(n).execute(db), write(n).execute(db), write(n).execute(db)]),
  (db, n) => {
    db.add({ compile: () => write(n).compile(db) })
  },
  async (db, n) => {
    await write(n).execute(db)
    db.add(bad(db))
  },
  (db) => {
    db.add(bad(db))
  },
  async (db, n) => {
    await write(n).execute(db)
    throw new Error('mine')
  },
  (db, n) => db.transaction().execute((trx) => write(n).execute(trx)),
  (db, n) => db.withClient((client) => client.query(`insert into notes (note) values ('#${n}')`)),
  (db, n) => {
    void write(n)
      .execute(db)
      .catch(() => {})
  },
  async (db, n) => {
    await write(n).execute(db)
    await db.commit()
    const rolledBack = write(n)
      .execute(db)
      .then(() => db.rollback())
    await moment(1)
    await Promise.allSettled([rolledBack, write(n).execute(db)])
  },
  async (db, n) => {
    await write(n)
      .execute(db)
      .catch(() => {})
    await db.rollback()
    await write(n).execute(db)
  },
  async (db, n) => {
    for await (const _ of db.selectFrom('notes').select('id').stream(1)) break
    await Promise.all([db.commit(), write(n).execute(db)])
  },
  async (db, n) => {
    await write(n).execute(db)
    const committed = db.commit().catch(() => {})
    // COMMIT has left by now, and with it perhaps the connection.
    await turn()
    await Promise.all([committed, write(n).execute(db)])
  },
]

/** What a connection must never have seen, in words. */
function faultsOf({ flights }: Recording): string[] {
  // What a report asks the server for comes over a connection of its own.
  if (flights.some(({ statements }) => statements[0]?.includes('pg_blocking_pids'))) return []
  const faults: string[] = []
  let status: 'I' | 'T' | 'E' = 'I'
  let owners = new Set<string>()
  for (const flight of flights) {
    if (flight.status === undefined) break
    const [first = ''] = flight.statements
    const isRefused = flight.errors.includes('25P02')
    const begins = first.startsWith('BEGIN')
    if (status === 'I' && first !== '' && !begins && first !== 'ROLLBACK')
      faults.push(`outside of a transaction: ${first}`)
    if (status === 'T' && begins) faults.push('BEGIN in a transaction')
    if (status === 'E' && !isRefused && first !== 'ROLLBACK') faults.push(`in a failed transaction: ${first}`)
    if (begins && !isRefused) owners = new Set()
    if (!isRefused) for (const text of flight.statements) for (const [, n] of text.matchAll(/'#(\d+)'/g)) owners.add(n!)
    if (owners.size > 1) faults.push(`one transaction of ${[...owners]}`)
    status = flight.status
  }
  return faults
}

for (const commitOn of MODES) {
  test(`each transaction on the wire is whole, and of one request (${commitOn})`, async (t) => {
    await database.query('delete from notes')
    const chance = dice(commitOn === 'onSend' ? 3 : 5)
    const pool = { size: 3, timeoutMillis: 200 }
    const relay = await buildRelay(t, database, { commitOn, pool, settleTimeoutMillis: 400 }, (app) => {
      app.post<{ Params: { way: string; n: string } }>('/ways/:way/:n', async ({ db, params }) => {
        await WAYS[Number(params.way)]?.(db, Number(params.n))
        return 'ok'
      })
    })
    const { app, proxy } = relay
    const port = await listen(app)
    proxy.delay(1)
    let next = 0
    const user = async () => {
      while (next < REQUESTS) {
        const path = `/ways/${Math.floor(chance() * WAYS.length)}/${next++}`
        if (chance() > 0.1) await relay.post(path)
        else {
          const client = new HttpClient(port).send('POST', path)
          await moment(chance() * 10)
          client.reset()
        }
      }
    }
    const vandal = async () => {
      while (next < REQUESTS) {
        await moment(20 + chance() * 30)
        if (chance() < 0.3) proxy.cut('reset', () => chance() < 0.5)
        else proxy.delay(Math.floor(chance() * 8))
      }
    }
    await Promise.all([vandal(), ...Array.from({ length: USERS }, user)])
    proxy.restore()
    const isIdle = () => app.db.snapshot().checkedOut + app.db.snapshot().waiting === 0
    await eventually(isIdle, { withinMillis: 5000, describe: () => JSON.stringify(app.db.snapshot()) })
    await nothingIsLeft(t)
    t.comment(JSON.stringify(app.db.snapshot().totals))
    t.strictSame(proxy.sessions.flatMap(faultsOf), [])
    t.ok(app.db.snapshot().totals.handOvers > REQUESTS / 10)
  })
}
