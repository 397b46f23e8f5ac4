import { sql } from 'kysely'
import type { PoolOptions } from '../../../lib/index.ts'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { add, pidOf, terminate } from '../../support/notebook.ts'
import { type Scene, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* Two faults at a time, on the way to a connection and back. Nobody else's scenarios. */

const database = await createDatabase(t, { sql: NOTES })
const LOST = '503 CONNECTION_LOST'
const PING: PoolOptions = { size: 1, prePing: { idleMillis: 1000, timeoutMillis: 300 } }

/** `POST /:note` writes it; `POST /hold/:note` stays until `goOn`, `POST /auto/:note` has no transaction. */
const withRoutes = (scene: Scene, options: SceneOptions = {}): SceneOptions => ({
  pool: { size: 1 },
  ...options,
  routes: (app) => {
    type Named = { Params: { note: string } }
    app.post<Named>('/note/:note', ({ db, params }) => writes(params.note)(db))
    app.post<Named>('/auto/:note', { config: { db: { autocommit: true } } }, ({ db, params }) =>
      writes(params.note)(db),
    )
    app.post<Named>('/hold/:note', async ({ db, params }) => {
      await add(db, params.note)
      scene.reached.open(await pidOf(db))
      await scene.goOn.opened
      await add(db, `${params.note} again`)
      return 'kept'
    })
    app.post<Named>('/sleep/:note', async ({ db, params }) => {
      await add(db, params.note)
      scene.reached.open(await pidOf(db))
      await sql`select pg_sleep(60)`.execute(db)
    })
  },
})

const waitFor = (scene: Scene, waiting: number) => eventually(() => scene.app.db.snapshot().waiting === waiting)

scenario(database, 'the server goes away while four wait, and one of them leaves', async (scene) => {
  await scene.open(withRoutes(scene))
  const holder = scene.post('/hold/a')
  await scene.reached.opened
  const guest = await scene.guest()
  guest.send('POST', '/note/gone')
  await waitFor(scene, 1)
  const waiters = ['b', 'c', 'd'].map((note) => scene.post(`/note/${note}`))
  await waitFor(scene, 4)
  guest.leave()
  await scene.proxy.refuse()
  scene.proxy.cut('end')
  const refused = await Promise.all(waiters)
  scene.goOn.open()
  const answers = [await holder, ...refused]
  await scene.proxy.accept()
  const unavailable = '503 UNAVAILABLE'
  return {
    answers,
    expected: [LOST, unavailable, unavailable, unavailable],
    rows: [],
    totals: { timeouts: 0, invalidated: 1 },
  }
})

scenario(database, 'a ping gets no answer, and the client it was sent for leaves', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open(withRoutes(scene, { pool: PING }))
  clock.advance(5000)
  scene.proxy.swallow()
  const guest = await scene.guest()
  guest.send('POST', '/note/gone')
  await eventually(() => scene.proxy.flights.length === 1)
  const waiters = [scene.post('/note/a'), scene.post('/note/b')]
  await waitFor(scene, 2)
  guest.leave()
  const answers = await Promise.all(waiters)
  const totals = { failedPings: 1, invalidated: 1, commits: 2, cancels: 0 }
  return { answers, expected: [200, 200], rows: ['a', 'b'], connection: 'gone', totals }
})

scenario(database, 'a connection is due, its goodbye is lost, and whom it was for leaves', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open(withRoutes(scene, { pool: { size: 1, recycleMillis: 60_000, prePing: false } }))
  clock.advance(70_000)
  scene.proxy.swallow({ passesClose: false })
  const guest = await scene.guest()
  guest.send('POST', '/note/gone')
  await eventually(() => scene.app.db.snapshot().totals.recycled === 1)
  const waiters = [scene.post('/note/a'), scene.post('/note/b')]
  await waitFor(scene, 2)
  guest.leave()
  const answers = await Promise.all(waiters)
  const { opened } = scene.app.db.snapshot().totals
  scene.t.equal(opened, 2)
  // What the server was never told of is still there: it is no fault of the pool's.
  await terminate(database, scene.pid)
  return { answers, expected: [200, 200], rows: ['a', 'b'], connection: 'gone', totals: { recycled: 1, commits: 2 } }
})

scenario(
  database,
  'a connection fails to open, after the client it was for has left, and others wait',
  async (scene) => {
    await scene.open(withRoutes(scene, { isOpen: false }))
    const startup = scene.proxy.trap({ from: 'client', type: 'startup' }, 'hold')
    const guest = await scene.guest()
    guest.send('POST', '/note/gone')
    await startup.sprung
    const waiters = [scene.post('/note/a'), scene.post('/note/b')]
    await waitFor(scene, 2)
    guest.leave()
    await eventually(() => scene.app.db.snapshot().waiters.length === 2)
    scene.proxy.cut('reset')
    const answers = await Promise.all(waiters)
    return { answers, expected: [200, 200], rows: ['a', 'b'], totals: { failedConnects: 1, opened: 1, checkouts: 2 } }
  },
)

for (const how of ['is killed', 'is never answered'] as const) {
  scenario(database, `DISCARD ALL ${how}, and of two who wait for it one leaves`, async (scene) => {
    const options = { resetOnReturn: 'discard', settleTimeoutMillis: 400 } as const
    await scene.open(withRoutes(scene, options))
    const trap = scene.proxy.trap(
      { from: 'client', type: 'P', text: 'DISCARD' },
      how === 'is killed' ? 'hold' : 'swallow',
    )
    const holder = scene.post('/hold/a')
    const pid = await scene.reached.opened
    const guest = await scene.guest()
    guest.send('POST', '/auto/gone')
    await waitFor(scene, 1)
    const waiter = scene.post('/auto/b')
    await waitFor(scene, 2)
    scene.goOn.open()
    await trap.sprung
    guest.leave()
    await waitFor(scene, 1)
    if (how === 'is killed') {
      await terminate(database, pid)
      trap.release()
    }
    const answers = [await holder, await waiter]
    // The next DISCARD ALL, which nobody waits for.
    await eventually(() => scene.app.db.snapshot().idle === 1)
    const totals = { invalidated: 1, opened: 1, timeouts: 0 }
    return { answers, expected: [200, 200], rows: ['a', 'a again', 'b'], connection: 'gone', totals }
  })
}

for (const dies of [true, false]) {
  scenario(
    database,
    `a cancel is held up on its way, ${dies ? 'the connection dies meanwhile' : 'the app is closed meanwhile'}, and somebody waits`,
    async (scene) => {
      await scene.open(withRoutes(scene, { settleTimeoutMillis: 600, closeGraceMillis: 200 }))
      const cancel = scene.proxy.trap({ from: 'client', type: 'cancel' }, 'hold')
      const guest = await scene.guest()
      guest.send('POST', '/sleep/lost')
      const pid = await scene.reached.opened
      await eventually(async () => (await scene.backends()).some(({ state }) => state === 'active'))
      guest.leave()
      await cancel.sprung
      const waiter = scene.post('/note/a')
      await waitFor(scene, 1)
      if (dies) scene.proxy.cut('reset', (recording) => recording.kind === 'session')
      else await scene.app.close()
      const answers = [await waiter]
      cancel.release()
      // Where the cancel never arrived nobody stops the server.
      await terminate(database, pid)
      if (dies)
        return { answers, expected: [200], rows: ['a'], connection: 'gone', totals: { cancels: 1, invalidated: 1 } }
      return { answers, expected: ['503 POOL_CLOSED'], rows: [], next: 'closed' }
    },
  )
}

scenario(
  database,
  'two requests hold one connection each and want another, and the client of one leaves',
  async (scene) => {
    const options: SceneOptions = {
      pool: { size: 2, timeoutMillis: 5000 },
      routes: (app) => {
        app.post<{ Params: { note: string } }>('/two/:note', async ({ db, params: { note } }) => {
          await add(db, note)
          if (note === 'a') scene.reached.open(1)
          await scene.goOn.opened
          await app.db.session((other) => add(other, `${note} inside`))
          return 'kept'
        })
      },
    }
    await scene.open(options)
    const guest = await scene.guest()
    guest.send('POST', '/two/a')
    await scene.reached.opened
    const other = scene.post('/two/b')
    await eventually(
      () =>
        scene.app.db.snapshot().holders.filter(({ state, statements }) => state === 'idle' && statements > 0).length ===
        2,
    )
    scene.goOn.open()
    await waitFor(scene, 2)
    guest.leave()
    const answers = [await other]
    return { answers, expected: [200], rows: ['b', 'a inside', 'b inside'], totals: { timeouts: 0, opened: 1 } }
  },
)

scenario(database, 'clients leave in the very moment in which they would be refused', async (scene) => {
  const connection = { connectionString: scene.proxy.connectionString, connectionTimeoutMillis: 10_000 }
  await scene.open(withRoutes(scene, { connection, pool: { size: 1, timeoutMillis: 20 } }))
  const holder = scene.post('/hold/a')
  await scene.reached.opened
  for (let round = 0; round < 40; round++) {
    const guest = await scene.guest()
    guest.send('POST', '/note/gone')
    await waitFor(scene, 1)
    await new Promise((resolve) => setTimeout(resolve, 15 + (round % 8)))
    guest.leave()
    await waitFor(scene, 0)
  }
  scene.goOn.open()
  return {
    answers: [await holder],
    expected: [200],
    rows: ['a', 'a again'],
    totals: { checkouts: 1, cancels: 0, opened: 0 },
  }
})

scenario(database, 'the backend is killed and a newcomer asks in the very moment of the hand-over', async (scene) => {
  await scene.open(withRoutes(scene))
  const holder = scene.post('/hold/a')
  const pid = await scene.reached.opened
  const waiters = [scene.post('/note/b'), scene.post('/note/c')]
  await waitFor(scene, 2)
  const commit = scene.proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
  scene.goOn.open()
  await commit.sprung
  const newcomer = scene.post('/note/d')
  await terminate(database, pid)
  commit.release()
  const [first, ...others] = await Promise.all([holder, ...waiters, newcomer])
  const isTold = scene.commitOn === 'onSend'
  // Nobody knows whether COMMIT came before the goodbye; that it did not is for the table to say.
  const expected = [isTold ? `${first!.status} ${first!.code}` : 200, 200, 200, 200]
  if (isTold) scene.t.match(first!.code, /^(CONNECTION_LOST|COMMIT_UNKNOWN)$/)
  return { answers: [first!, ...others], expected, rows: ['b', 'c', 'd'], connection: 'gone', totals: { opened: 1 } }
})
