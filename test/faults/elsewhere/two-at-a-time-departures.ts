import { Readable } from 'node:stream'
import { sql } from 'kysely'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { openHttp } from '../../support/http-client.ts'
import { add, pidOf, terminate } from '../../support/notebook.ts'
import { freeze, RELAY } from '../../support/relay.ts'
import { type Scene, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { t } from '../../support/test.ts'

/* Two faults at a time, where the client or the app goes too. Nobody else's scenarios. */

const database = await createDatabase(t, { sql: RELAY })

/** `POST /note/:note` writes it. */
const withNotes = (options: SceneOptions = {}): SceneOptions => ({
  pool: { size: 1 },
  ...options,
  routes: (app) => {
    app.post<{ Params: { note: string } }>('/note/:note', ({ db, params }) => writes(params.note)(db))
    return options.routes?.(app)
  },
})
const told = ({ commitOn }: Scene, failure: string | number) => (commitOn === 'onSend' ? failure : 200)
const handedOver = (scene: Scene) => eventually(() => scene.app.db.snapshot().totals.handOvers > 0)

for (const first of ['the client', 'the backend'] as const) {
  scenario(database, `over HTTP/2 the client resets and the backend dies, ${first} first`, async (scene) => {
    await scene.open(
      withNotes({
        fastify: { http2: true },
        handler: async (db) => {
          await add(db, 'lost')
          scene.reached.open(await pidOf(db))
          await sql`select pg_sleep(60)`.execute(db)
        },
      }),
    )
    const guest = await scene.guest('HTTP/2')
    guest.send('POST', '/', {})
    const pid = await scene.reached.opened
    const waiter = scene.post('/note/kept')
    await eventually(() => scene.app.db.snapshot().waiting === 1)
    if (first === 'the client') guest.leave()
    const killed = terminate(database, pid)
    if (first === 'the backend') guest.leave()
    await killed
    return {
      answers: [await waiter],
      expected: [200],
      rows: ['kept'],
      connection: 'gone',
      totals: { invalidated: 1, commits: 1 },
    }
  })
}

scenario(database, 'a client stops reading a stream, and the backend that feeds it dies', async (scene) => {
  await scene.open(
    withNotes({
      routes: (app) => {
        app.get('/rows', async ({ db }, reply) => {
          await add(db, 'lost')
          scene.reached.open(await pidOf(db))
          const rows = db.selectFrom(sql<{ n: number }>`generate_series(1, 10000000)`.as('n')).selectAll().stream(1000)
          return reply.send(
            Readable.from(
              (async function* () {
                for await (const _row of rows) yield 'x'.repeat(1000)
              })(),
            ),
          )
        })
      },
    }),
  )
  const client = (await openHttp(scene.t, scene.app)).send('GET', '/rows')
  const pid = await scene.reached.opened
  await client.receives('xxx')
  client.pause()
  const waiter = scene.post('/note/kept')
  await eventually(() => scene.app.db.snapshot().waiting === 1)
  await terminate(database, pid)
  const answers = [await waiter]
  client.resume()
  await client.closed
  return { answers, expected: [200], rows: ['kept'], connection: 'gone', totals: { commits: 1, invalidated: 1 } }
})

scenario(database, 'the app is closed while a connection is handed over, which breaks', async (scene) => {
  await scene.open(withNotes({ closeGraceMillis: 1000, settleTimeoutMillis: 3000 }))
  const { frozen, thaw } = await freeze(scene.t, database)
  const leader = scene.post('/note/slow')
  await frozen()
  const follower = scene.post('/note/lost')
  await handedOver(scene)
  const closed = scene.app.close()
  scene.proxy.cut('reset')
  const answers = [await leader, await follower]
  await thaw()
  await closed
  // The server has finished what nobody heard of any more: that is what 'unknown' says.
  await eventually(async () => (await database.rows('notes')).length === 1)
  return { answers, expected: [told(scene, '500 COMMIT_UNKNOWN'), '503 POOL_CLOSED'], rows: ['slow'], next: 'closed' }
})

scenario(
  database,
  'the answer has left, its COMMIT is slow, and the app is closed: what was acknowledged is kept',
  async (scene) => {
    await scene.open(withNotes({ closeGraceMillis: 50, settleTimeoutMillis: 3000 }))
    const { frozen, thaw } = await freeze(scene.t, database)
    const answer = await scene.post('/note/slow')
    await frozen()
    const guest = await scene.guest()
    guest.send('POST', '/note/lost')
    await handedOver(scene)
    guest.leave()
    const closed = scene.app.close()
    await eventually(() => scene.app.db.snapshot().waiting === 0)
    await thaw()
    await closed
    return { answers: [answer], expected: [200], rows: ['slow'], next: 'closed' }
  },
  ['onResponse'],
)
