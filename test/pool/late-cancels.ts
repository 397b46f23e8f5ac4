import { once } from 'node:events'
import { type AddressInfo, createServer, Socket } from 'node:net'
import { setTimeout as moment } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import { type RawBuilder, sql } from 'kysely'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { HttpClient, listen, openHttp } from '../support/http-client.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))

const napping = (seconds: number): RawBuilder<unknown> => sql`select pg_sleep(${seconds}::float8)`
/** Reproducible chance. */
function dice(seed: number): () => number {
  let state = seed
  return () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648
    return state / 2_147_483_648
  }
}

/** Every request writes its number twice, around a nap, so that what is half committed shows. */
async function buildPairs(t: Test, size: number, commitOn: 'onSend' | 'onResponse'): Promise<FastifyInstance> {
  return await buildApp(t, database, { commitOn, pool: { size, timeoutMillis: 30_000 } }, (app) => {
    app.post('/:note/:style/:seconds', async ({ db, params }) => {
      const { note, style, seconds } = params as { note: string; style: string; seconds: string }
      const nap = () => napping(Number(seconds)).execute(db)
      if (style === 'parallel') await Promise.all([add(db, note), nap(), add(db, note)])
      else if (style === 'deferred') {
        await nap()
        db.add(db.insertInto('notes').values({ note }))
        db.add(db.insertInto('notes').values({ note }))
      } else {
        await add(db, note)
        if (style === 'nested') await db.transaction().execute((trx) => napping(Number(seconds)).execute(trx))
        else await nap()
        await add(db, note)
      }
      return 'ok'
    })
  })
}

for (const { size, commitOn } of [
  { size: 1, commitOn: 'onSend' },
  { size: 2, commitOn: 'onSend' },
  { size: 2, commitOn: 'onResponse' },
] as const) {
  test(`${commitOn}, size ${size}: clients that leave at any moment hurt nobody else`, async (t) => {
    const app = await buildPairs(t, size, commitOn)
    const port = await listen(app)
    const chance = dice(size)
    const styles = ['serial', 'parallel', 'nested', 'deferred']
    const honest: string[] = []
    const failures: string[] = []
    let sent = 0
    const until = performance.now() + 5000
    const user = async (leaves: boolean) => {
      while (performance.now() < until) {
        const note = `${leaves ? 'left' : 'stayed'} ${++sent}`
        const style = styles[Math.floor(chance() * styles.length)]
        // What runs gets 50 ms before it is cancelled: naps that end about then meet the cancel on its way.
        const seconds = leaves ? 0.045 + chance() * 0.03 : chance() * 0.003
        const client = new HttpClient(port).send('POST', `/${encodeURIComponent(note)}/${style}/${seconds}`)
        if (leaves) {
          await moment(chance() * 20)
          if (chance() < 0.5) client.reset()
          else client.destroy()
        } else {
          const answer = await client.response(30_000)
          if (answer.status !== 200) failures.push(answer.body)
          honest.push(note)
          client.destroy()
        }
      }
    }
    await Promise.all([user(true), user(false), user(true), user(false)])
    await eventually(() => app.db.snapshot().checkedOut === 0 && app.db.snapshot().waiting === 0, {
      withinMillis: 10_000,
    })
    t.strictSame(failures, [], 'nobody who stayed was told 57014, or anything but 200')
    const counts = new Map<string, number>()
    for (const note of await notesIn(database)) counts.set(note, (counts.get(note) ?? 0) + 1)
    t.strictSame(
      [...counts].filter(([, count]) => count !== 2),
      [],
      'nothing is half committed',
    )
    t.strictSame(
      honest.filter((note) => !counts.has(note)),
      [],
      'who was told 200 finds the rows',
    )
    const { cancels, opened } = app.db.snapshot().totals
    t.ok(cancels > 10, `${cancels} cancels among ${sent} requests`)
    t.ok(opened <= size + 2, `${opened} connections opened: a cancel costs none`)
  })
}

test('no cancel is sent before BEGIN is answered', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async ({ db }) => {
      await Promise.all([add(db, 'lost'), napping(30).execute(db)])
    })
    app.get('/', ({ db }) => pidOf(db))
  })
  await app.inject('/')
  const begun = proxy.trap({ from: 'server', type: 'C', text: 'BEGIN' }, 'hold')
  const client = (await openHttp(t, app)).send('POST', '/')
  const { pid } = await begun.sprung
  const since = performance.now()
  client.destroy()
  await eventually(() => performance.now() - since > 150)
  t.strictSame(proxy.cancels, [], 'not yet')
  begun.release()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.strictSame(proxy.cancels, [pid])
  t.strictSame(await notesIn(database), [])
  t.equal(Number((await app.inject('/')).body), pid, 'it is used again')
})

test('no cancel is sent once COMMIT is, and what was committed stands', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'kept')
    })
  })
  const committed = proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'hold')
  const client = (await openHttp(t, app)).send('POST', '/')
  await committed.sprung
  const since = performance.now()
  client.destroy()
  await eventually(() => performance.now() - since > 150)
  committed.release()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.strictSame(proxy.cancels, [])
  t.strictSame(await notesIn(database), ['kept'])
  t.match(app.db.snapshot(), { open: 1, totals: { commits: 1, cancels: 0 } })
})

test('a cancel that is late holds its connection back from who waits, until it has had its effect', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const options = { connectionString: proxy.connectionString, pool: { size: 1 } }
  const asleep = gate<number>()
  const lock = await database.client()
  const app = await buildApp(t, database, options, (app) => {
    app.post('/', async ({ db }) => {
      asleep.open(await pidOf(db))
      await sql`select pg_advisory_xact_lock(42)`.execute(db)
    })
    app.get('/', async ({ db }) => {
      await napping(0.05).execute(db)
      return pidOf(db)
    })
  })
  await lock.query('select pg_advisory_lock(42)')
  const cancel = proxy.trap({ from: 'client', type: 'cancel' }, 'hold')
  const client = (await openHttp(t, app)).send('POST', '/')
  const pid = await asleep.opened
  const waiter = app.inject('/')
  await eventually(() => app.db.snapshot().waiting === 1)
  client.destroy()
  await cancel.sprung
  // The statement ends by itself, and now the signal could hit whoever comes next.
  await lock.query('select pg_advisory_unlock(42)')
  await eventually(async () => (await database.backends()).every(({ state }) => state === 'idle in transaction'))
  const since = performance.now()
  await eventually(() => performance.now() - since > 100)
  t.match(app.db.snapshot(), { checkedOut: 1, waiting: 1 })
  cancel.release()
  t.equal((await waiter).statusCode, 200)
  t.equal(Number((await waiter).body), pid)
  t.match(app.db.snapshot().totals, { cancels: 1, opened: 1 })
})

for (const { title, deed } of [
  { title: 'hangs', deed: 'swallow' },
  { title: 'is cut off', deed: 'reset' },
] as const) {
  test(`a cancel that ${title} costs the connection, and who waits gets another one`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const options = { connectionString: proxy.connectionString, pool: { size: 1 }, settleTimeoutMillis: 300 }
    const asleep = gate<number>()
    const app = await buildApp(t, database, options, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'lost')
        asleep.open(await pidOf(db))
        await napping(1).execute(db)
      })
      app.get('/', ({ db }) => pidOf(db))
    })
    proxy.trap({ from: 'client', type: 'cancel' }, deed)
    const client = (await openHttp(t, app)).send('POST', '/')
    const pid = await asleep.opened
    const waiter = app.inject('/')
    await eventually(() => app.db.snapshot().waiting === 1)
    client.destroy()
    t.equal((await waiter).statusCode, 200)
    t.not(Number((await waiter).body), pid)
    t.match(app.db.snapshot(), { totals: { cancels: 1, opened: 2, invalidated: 1 } })
    await eventually(async () => (await database.backends()).length === 1)
    t.strictSame(await notesIn(database), [])
  })
}

test('where cancelling is refused, the connection is given up', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const asleep = gate()
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'lost')
      asleep.open()
      await napping(1).execute(db)
    })
  })
  const client = (await openHttp(t, app)).send('POST', '/')
  await asleep.opened
  await proxy.refuse()
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.match(app.db.snapshot(), { open: 0, totals: { cancels: 1, invalidated: 1 } })
  await eventually(async () => (await database.backends()).length === 0)
  t.strictSame(await notesIn(database), [])
})

test('a cancel that reaches another server than the one meant does not keep the session for ever', async (t) => {
  // A name that stands for several servers: the cancel request goes to one that knows nothing of our backend.
  const stranger = createServer((socket) => void socket.on('error', () => {}).on('data', () => socket.end()))
  stranger.listen(0, '127.0.0.1')
  await once(stranger, 'listening')
  t.teardown(() => stranger.close())
  const { hostname: host, port, username: user, password, pathname } = new URL(database.connectionString)
  let sockets = 0
  class Rotating extends Socket {
    override connect(...[port, host]: unknown[]): this {
      const isFirst = ++sockets === 1
      return super.connect(isFirst ? Number(port) : (stranger.address() as AddressInfo).port, String(host))
    }
  }
  const connection = {
    host,
    port: Number(port),
    user,
    password,
    database: pathname.slice(1),
    stream: () => new Rotating(),
  }
  const asleep = gate()
  const app = await buildApp(t, database, { connection, settleTimeoutMillis: 300 }, (app) => {
    app.post('/', async ({ db }) => {
      await add(db, 'lost')
      asleep.open()
      await napping(4).execute(db)
    })
  })
  const client = (await openHttp(t, app)).send('POST', '/')
  await asleep.opened
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep')))
  const since = performance.now()
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 3000 })
  t.ok(performance.now() - since < 1500, `after ${performance.now() - since} ms`)
  t.match(app.db.snapshot(), { open: 0, totals: { cancels: 1, invalidated: 1 } })
  await database.query('select pg_terminate_backend(pid) from pg_stat_activity where query like $1', ['%pg_sleep($1%'])
  await eventually(async () => (await database.backends()).length === 0)
  t.strictSame(await notesIn(database), [])
})
