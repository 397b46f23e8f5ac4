import { sql } from 'kysely'
import requestDb from '../../../lib/index.ts'
import { captureLog } from '../../support/captured-log.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { handmade } from '../../support/handmade.ts'
import { add, pidOf } from '../../support/notebook.ts'
import { watchPeak } from '../../support/peak.ts'
import { PROTOCOLS, type Scene, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t, test } from '../../support/test.ts'

/* The pool and its options. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, { sql: NOTES })
const TIMEOUT = '503 POOL_TIMEOUT'

/** A request that holds its connection until `goOn`. */
async function held(scene: Scene): Promise<ReturnType<Scene['post']>[]> {
  const answer = scene.post('/hold')
  await scene.reached.opened
  return [answer]
}
const holds = (scene: Scene) => (app: Parameters<NonNullable<Parameters<Scene['open']>[0]>['routes'] & object>[0]) => {
  app.post('/hold', async ({ db }) => {
    await add(db, 'held')
    scene.reached.open(await pidOf(db))
    await scene.goOn.opened
    return 'held'
  })
}

scenario(database, '1 who sends no statement opens nothing', async (scene) => {
  await scene.open({
    isOpen: false,
    handler: (db) => db.selectFrom('notes').selectAll().compile().sql,
    routes: (app) => {
      app.post('/only-looks', async (request) => typeof request.db)
      app.post('/checked', { schema: { body: { type: 'object', required: ['a'] } } }, async () => 'no')
    },
  })
  const answers = [
    await scene.post(),
    await scene.post('/only-looks'),
    await scene.post('/checked', {}),
    await scene.post('/nowhere'),
  ]
  scene.t.strictSame(scene.proxy.recordings, [])
  return { answers, expected: [200, 200, '400 FST_ERR_VALIDATION', 404], rows: [], totals: { opened: 0, checkouts: 0 } }
})

scenario(database, '2 ten first statements in parallel', async (scene) => {
  await scene.open({
    pool: { size: 5 },
    handler: (db) => Promise.all(Array.from({ length: 10 }, () => pidOf(db))),
  })
  const answers = [await scene.post()]
  scene.t.equal(new Set(JSON.parse((answers[0] as { body: string }).body)).size, 1, 'on one connection')
  const begins = scene.proxy
    .statements()
    .flat()
    .filter((text) => text.startsWith('BEGIN'))
  scene.t.equal(begins.length, 1)
  return { answers, expected: [200], rows: [], connection: 'reused', totals: { checkouts: 1 } }
})

scenario(database, '3 size and overflow', async (scene) => {
  await scene.open({
    isOpen: false,
    pool: { size: 2, maxOverflow: 1 },
    handler: async (db) => {
      await sql`select pg_sleep(0.05)`.execute(db)
      return writes('kept')(db)
    },
  })
  const peak = await watchPeak(scene.t, database, scene.application)
  const answers = await Promise.all([1, 2, 3, 4].map(() => scene.post()))
  scene.t.ok((await peak.stop()) <= 3, 'never more than three backends')
  await eventually(() => scene.app.db.snapshot().open === 2)
  return { answers, expected: [200, 200, 200, 200], rows: Array(4).fill('kept'), totals: { closed: 1, opened: 3 } }
})

scenario(database, '5 the wait is over after timeoutMillis, and not before', async (scene) => {
  await scene.open({ pool: { size: 1, timeoutMillis: 300 }, handler: writes('lost'), routes: holds(scene) })
  const answers = await held(scene)
  const since = performance.now()
  const refused = await scene.post()
  scene.t.ok(performance.now() - since >= 299, `${performance.now() - since} ms`)
  scene.goOn.open()
  return {
    answers: [...(await Promise.all(answers)), refused],
    expected: [200, TIMEOUT],
    rows: ['held'],
    connection: 'reused',
    totals: { timeouts: 1, opened: 0 },
  }
})

scenario(database, '6 timeoutMillis 0 refuses at once', async (scene) => {
  const connection = { connectionString: scene.proxy.connectionString, connectionTimeoutMillis: 5000 }
  const pool = { size: 1, timeoutMillis: 0 }
  await scene.open({ connection, pool, handler: writes('lost'), routes: holds(scene) })
  const answers = await held(scene)
  const refused = await scene.post()
  scene.t.equal(scene.app.db.snapshot().checkedOut, 1, 'while the connection is still held')
  scene.goOn.open()
  const told = [...(await Promise.all(answers)), refused]
  return { answers: told, expected: [200, TIMEOUT], rows: ['held'], totals: { timeouts: 1 } }
})

scenario(database, '7 twenty are served in the order of coming', async (scene) => {
  const order: string[] = []
  await scene.open({
    pool: { size: 1 },
    routes: (app) => {
      holds(scene)(app)
      app.post<{ Params: { n: string } }>('/queued/:n', async ({ db, params: { n } }) => {
        await add(db, n)
        order.push(n)
        return n
      })
    },
  })
  const first = await held(scene)
  const queued = Array.from({ length: 20 }, (_, n) => scene.post(`/queued/${n}`))
  await eventually(() => scene.app.db.snapshot().waiting === 20)
  scene.goOn.open()
  const answers = [...(await Promise.all(first)), ...(await Promise.all(queued))]
  const expected = Array.from({ length: 20 }, (_, n) => String(n))
  scene.t.strictSame(order, expected)
  return { answers, expected: Array(21).fill(200), rows: ['held', ...expected], connection: 'reused' }
})

scenario(database, '8 failed connects give their slots back', async (scene) => {
  await scene.open({ isOpen: false, pool: { size: 3 }, handler: writes('kept') })
  await scene.proxy.refuse()
  const failed = await Promise.all(Array.from({ length: 10 }, () => scene.post()))
  await scene.proxy.accept()
  const served = await Promise.all(Array.from({ length: 6 }, () => scene.post()))
  const expected = [...Array(10).fill('503 UNAVAILABLE'), ...Array(6).fill(200)]
  return { answers: [...failed, ...served], expected, rows: Array(6).fill('kept'), totals: { opened: 3 } }
})

scenario(database, '10 a connect that hangs keeps nobody else waiting', async (scene) => {
  const connection = { connectionString: scene.proxy.connectionString, connectionTimeoutMillis: 1000 }
  await scene.open({ connection, isOpen: false, pool: { size: 2 }, handler: writes('kept') })
  scene.proxy.silenceStartup(1)
  const hanging = scene.post()
  await eventually(() => scene.proxy.recordings.length === 1)
  const served = [await scene.post(), await scene.post()]
  scene.t.equal(scene.app.db.snapshot().totals.failedConnects, 0, 'served while it hangs')
  const answers = [...served, await hanging]
  const totals = { failedConnects: 1 }
  return { answers, expected: [200, 200, '503 UNAVAILABLE'], rows: ['kept', 'kept'], totals }
})

scenario(database, '11 a connection that is due is replaced, never under its user', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open({ pool: { size: 1, recycleMillis: 1000 }, handler: writes('kept'), routes: holds(scene) })
  const first = await held(scene)
  clock.advance(2000)
  scene.t.match(await scene.backends(), [{ pid: scene.pid }], 'not cut in use')
  scene.goOn.open()
  const answers = [...(await Promise.all(first)), await scene.post()]
  return { answers, expected: [200, 200], rows: ['held', 'kept'], connection: 'gone', totals: { recycled: 1 } }
})

scenario(database, '12 an administrator sets the clock back by an hour', async (scene) => {
  await scene.open({ pool: { size: 1, recycleMillis: 60_000 }, handler: writes('kept') })
  const { now } = Date
  Date.now = () => now() - 3_600_000
  scene.t.teardown(() => {
    Date.now = now
  })
  const answers = [await scene.post(), await scene.post()]
  const totals = { recycled: 0, opened: 0, failedPings: 0 }
  return { answers, expected: [200, 200], rows: ['kept', 'kept'], connection: 'reused', totals }
})

scenario(database, '14 a handler that holds a connection asks its own app for another', async (scene) => {
  await scene.open({
    pool: { size: 1, timeoutMillis: 300 },
    handler: async (db) => {
      await add(db, 'outer')
      const inner = await scene.app.inject({ method: 'POST', url: '/inner' })
      scene.t.match(inner.json(), { code: 'FST_REQUEST_DB_POOL_TIMEOUT' })
      return 'outer decides'
    },
    routes: (app) => app.post('/inner', ({ db }) => writes('inner')(db)),
  })
  return { answers: [await scene.post()], expected: [200], rows: ['outer'], connection: 'reused' }
})

scenario(database, '15 a leak is told of once, and left alone', async (scene) => {
  await scene.open({ leakDetectionMillis: 50, routes: holds(scene) })
  const answers = await held(scene)
  const warned = () => scene.log.lines.filter(({ level, msg }) => level >= 40 && /leak|held/i.test(msg))
  await eventually(() => warned().length > 0)
  scene.t.match(JSON.stringify(warned()[0]), /\/hold/)
  scene.t.match(JSON.stringify(warned()[0]), /catalogue\/pool\.ts/)
  scene.t.match(await scene.backends(), [{ pid: scene.pid }])
  scene.goOn.open()
  return { answers: await Promise.all(answers), expected: [200], rows: ['held'], connection: 'reused' }
})

scenario(database, '16 idle connections are kept', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open({ pool: { size: 2 }, handler: (db) => pidOf(db) })
  const answers = await Promise.all([scene.post(), scene.post()])
  const before = (await scene.backends()).map(({ pid }) => pid)
  clock.advance(11_000)
  scene.t.strictSame(
    (await scene.backends()).map(({ pid }) => pid),
    before,
  )
  return { answers, expected: [200, 200], rows: [], connection: 'reused', totals: { opened: 1 } }
})

const WRONG = [
  ['pool.size', { size: -1 }],
  ['pool.size', { size: Number.NaN }],
  ['pool.size', { size: '5' }],
  ['pool.size', { size: 0.5 }],
  ['pool.maxOverflow', { maxOverflow: -2 }],
  ['pool.timeoutMillis', { timeoutMillis: -5 }],
  ['pool.recycleMillis', { recycleMillis: 0 }],
] as const
for (const [name, pool] of WRONG) {
  void test(`17 ${name} ${String(Object.values(pool)[0])} is refused`, async (t) => {
    const { app, connectionString } = handmade(t, database)
    app.register(requestDb, { connectionString, pool: pool as object })
    await t.rejects(Promise.resolve(app.ready()), { code: 'FST_REQUEST_DB_INVALID_OPTION', message: name })
  })
}

for (const [title, decorator] of [
  ['without a name', undefined],
  ['with one name', 'reports'],
] as const) {
  void test(`18 registered twice ${title} is refused, and no pool is left open`, async (t) => {
    const { app, connectionString } = handmade(t, database, { logger: captureLog().options })
    const options = { connectionString, ...(decorator && { decorator }) }
    app.register(requestDb, options)
    app.register(async (child) => void child.register(requestDb, options))
    await t.rejects(Promise.resolve(app.ready()), { message: decorator ?? 'db' })
    await app.close()
    t.strictSame(await database.backends(new URL(connectionString).searchParams.get('application_name') ?? ''), [])
  })
}

for (const protocol of PROTOCOLS) {
  scenario(database, `19 four hundred mixed requests over ${protocol}`, async (scene) => {
    await scene.open({
      pool: { size: 3 },
      ...(protocol === 'HTTP/2' && { fastify: { http2: true } }),
      routes: (app) => {
        app.post<{ Params: { n: string } }>('/some/:n', async ({ db, params: { n } }) => {
          await add(db, n)
          if (Number(n) % 5 === 1) throw new Error('mine')
          if (Number(n) % 5 === 2) await sql`select 1/0`.execute(db).catch(() => {})
          return 'done'
        })
      },
    })
    // Listens from here on.
    await scene.guest(protocol)
    const kept: string[] = []
    for (let round = 0; round < 20; round++) {
      await Promise.all(
        Array.from({ length: 20 }, async (_, at) => {
          const n = round * 20 + at
          const guest = await scene.guest(protocol)
          guest.send('POST', `/some/${n}`)
          // Who leaves at once may be served or not, and is asked no more.
          if (n % 5 === 3) return guest.leave()
          const answer = await guest.answer()
          if (answer !== 'none' && answer.status === 200) kept.push(String(n))
        }),
      )
    }
    await eventually(() => scene.app.db.snapshot().checkedOut + scene.app.db.snapshot().waiting === 0)
    await database.query('delete from notes where note::int % 5 = 3')
    const rows = (await database.query<{ note: string }>('select note from notes order by id')).map(({ note }) => note)
    scene.t.strictSame([...rows].sort(), kept.sort(), 'kept is what was acknowledged')
    scene.t.equal(kept.length, 160)
    return { answers: [], expected: [], rows }
  })
}
