import { setTimeout as moment } from 'node:timers/promises'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { HttpClient, listen } from '../support/http-client.ts'
import { add, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

/** Reproducible chance. */
function dice(seed: number): () => number {
  let state = seed
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648
    return state / 2_147_483_648
  }
}

// What a request may be told while everything breaks, and whether its rows are surely gone then.
const SURELY_GONE = new Set(['POOL_TIMEOUT', 'POOL_SATURATED', 'UNAVAILABLE', 'CONNECTION_LOST', 'TRANSACTION_ABORTED'])
const UNKNOWN = 'COMMIT_UNKNOWN'

for (const seed of [1, 2]) {
  test(`everything breaks for some seconds (seed ${seed}): nobody is lied to, and all of the pool is there afterwards`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const application = `chaos ${seed}`
    const url = new URL(proxy.connectionString)
    url.searchParams.set('application_name', application)
    const pool = {
      size: 3,
      maxOverflow: 1,
      timeoutMillis: 300,
      maxWaiting: 12,
      recycleMillis: 400,
      prePing: { idleMillis: 5, timeoutMillis: 60 },
    }
    const all = gate()
    let inside = 0
    const options = { connectionString: url.href, pool, settleTimeoutMillis: 150, maxSessionMillis: 1500 }
    const app = await buildApp(t, database, options, (app) => {
      app.post('/:style/:note', async ({ db, params }) => {
        const { style, note } = params as { style: string; note: string }
        if (style === 'deferred') db.add(db.insertInto('notes').values([{ note }, { note }]))
        else if (style === 'nested') {
          await add(db, note)
          await db.transaction().execute((trx) => trx.insertInto('notes').values({ note }).execute())
        } else if (style === 'parallel') await Promise.all([add(db, note), add(db, note)])
        else {
          await add(db, note)
          await add(db, note)
        }
      })
      app.get('/all', async ({ db }) => {
        await pidOf(db)
        if (++inside === 4) all.open()
        await all.opened
      })
    })
    const port = await listen(app)
    const chance = dice(seed)
    const styles = ['deferred', 'nested', 'parallel', 'serial']
    const faults = [
      () => proxy.cut('reset', () => chance() < 0.5),
      () => proxy.cut('end', () => chance() < 0.5),
      () => proxy.swallow(),
      () => proxy.silenceStartup(2),
      () => proxy.failStartup('57P03', 3),
      () => proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, 'reset'),
      () => proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'reset'),
      () => proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'end'),
      () => proxy.trap({ from: 'server', type: 'C', text: 'INSERT' }, 'swallow'),
      () => proxy.trap({ from: 'client', type: 'cancel' }, 'reset'),
      () => proxy.delay(Math.floor(chance() * 30)),
      () => proxy.delay(0),
      async () => {
        const [victim] = await database.backends(application)
        if (victim) await terminate(database, victim.pid)
      },
      async () => {
        await proxy.refuse()
        await moment(20)
        await proxy.accept()
      },
    ]
    const until = performance.now() + 3000
    const counts: Record<string, number> = {}
    const accepted: string[] = []
    const gone: string[] = []
    let sent = 0
    const user = async (leaves: boolean) => {
      while (performance.now() < until) {
        const note = `${seed}-${++sent}`
        const url = `/${styles[Math.floor(chance() * 4)]}/${note}`
        if (leaves) {
          const client = new HttpClient(port).send('POST', url)
          await moment(chance() * 30)
          client.reset()
          continue
        }
        const answer = await app.inject({ method: 'POST', url })
        const code = answer.statusCode === 200 ? 'OK' : answer.json().code.replace('FST_REQUEST_DB_', '')
        counts[code] = (counts[code] ?? 0) + 1
        if (code === 'OK') accepted.push(note)
        else if (SURELY_GONE.has(code)) gone.push(note)
        if (code !== 'OK') await moment(5)
      }
    }
    const breaker = async () => {
      while (performance.now() < until) {
        await faults[Math.floor(chance() * faults.length)]!()
        await moment(chance() * 60)
      }
    }
    await Promise.all([breaker(), ...Array.from({ length: 8 }, () => user(false)), user(true), user(true)])
    proxy.restore()
    await proxy.accept()
    // Traps that are still set are walked into now.
    let good = 0
    for (let tries = 0; good < 10 && tries < 200; tries++) {
      const { statusCode } = await app.inject({ method: 'POST', url: `/serial/after-${seed}-${tries}` })
      good = statusCode === 200 ? good + 1 : 0
    }
    await eventually(() => app.db.snapshot().checkedOut === 0 && app.db.snapshot().waiters.length === 0, {
      withinMillis: 10_000,
      describe: () => JSON.stringify(app.db.snapshot()),
    })
    const told = new Set([...Object.keys(counts)])
    for (const code of told)
      t.ok(code === 'OK' || code === UNKNOWN || SURELY_GONE.has(code) || code === 'SESSION_ENDED', code)
    t.equal(good, 10, 'it works again, without a fault in between')
    const rows = new Map<string, number>()
    for (const note of await notesIn(database)) rows.set(note, (rows.get(note) ?? 0) + 1)
    t.strictSame(
      [...rows].filter(([, count]) => count !== 2),
      [],
      'nothing is half committed, nothing is there twice',
    )
    t.strictSame(
      accepted.filter((note) => !rows.has(note)),
      [],
      'whoever was told 200 finds the rows',
    )
    t.strictSame(
      gone.filter((note) => rows.has(note)),
      [],
      'what was called rolled back is',
    )
    proxy.cut('end')
    await eventually(() => app.db.snapshot().open === 0)
    const answers = await Promise.all([1, 2, 3, 4].map(() => app.inject('/all')))
    t.strictSame(
      answers.map(({ statusCode }) => statusCode),
      [200, 200, 200, 200],
      'every slot is there',
    )
    await eventually(() => app.db.snapshot().open === 3)
  })
}
