import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import type { FastifyInstance } from 'fastify'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { type Gate, gate } from '../../support/gate.ts'
import { listen, openHttp } from '../../support/http-client.ts'
import { openHttp2 } from '../../support/http2-client.ts'
import { pidOf } from '../../support/notebook.ts'
import { nothingIsLeft } from '../../support/nothing-left.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Clients that came in masses and have left are forgotten: nothing in the pool, the queue or the reports keeps them. */

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void
const database = await createDatabase(t, { sql: NOTES })

interface Crowd {
  readonly app: FastifyInstance
  /** Who came, as long as something keeps them. */
  readonly seen: WeakRef<object>[]
  readonly goOn: Gate
  kept(): number
}

/** One connection, which is held until `goOn`; everybody else has to wait. */
async function crowd(t: Test, fastifyOptions: { http2?: true } = {}): Promise<Crowd> {
  const seen: WeakRef<object>[] = []
  const [held, goOn] = [gate(), gate()]
  t.teardown(() => goOn.open())
  const options = { pool: { size: 1, maxWaiting: 150 }, echoPool: 'debug', leakDetectionMillis: 60_000 } as const
  const routes = (app: FastifyInstance) => {
    app.get('/hold', async ({ db }) => {
      const pid = await pidOf(db)
      held.open()
      await goOn.opened
      return pid
    })
    app.get('/wait', async (request) => {
      seen.push(new WeakRef(request))
      await pidOf(request.db)
      return 'done'
    })
    app.get('/ordinary', ({ db }) => pidOf(db))
  }
  const app = await buildApp(t, database, options, routes, fastifyOptions)
  void app.inject('/hold')
  await held.opened
  const kept = () => seen.filter((one) => one.deref() !== undefined).length
  return { app, seen, goOn, kept }
}

async function areForgotten(t: Test, { app, seen, goOn, kept }: Crowd): Promise<void> {
  await eventually(() => app.db.snapshot().waiting === 0, { withinMillis: 10_000 })
  // While the connection is still held: nobody has to be served for the others to be forgotten.
  await eventually(
    () => {
      collect()
      return kept() <= seen.length / 20
    },
    { withinMillis: 10_000, describe: () => `${kept()} of ${seen.length} requests are kept` },
  )
  t.match(app.db.snapshot(), { open: 1, checkedOut: 1, waiting: 0 })
  goOn.open()
  await nothingIsLeft(t, 5000)
  t.equal((await app.inject('/ordinary')).statusCode, 200)
}

test('those who waited over HTTP/1.1 and left, and those who were refused', async (t) => {
  const all = await crowd(t)
  await listen(all.app)
  for (let round = 1; round <= 2; round++) {
    const clients = await Promise.all(Array.from({ length: 200 }, () => openHttp(t, all.app)))
    for (const client of clients) client.send('GET', '/wait')
    await eventually(() => all.seen.length === round * 200, { withinMillis: 10_000 })
    for (const client of clients) client.reset()
  }
  t.equal(all.app.db.snapshot().totals.checkouts, 1)
  await areForgotten(t, all)
})

test('those who waited over HTTP/2 and reset their streams', async (t) => {
  const all = await crowd(t, { http2: true })
  const client = await openHttp2(t, all.app)
  const streams = Array.from({ length: 100 }, () => client.send('GET', '/wait'))
  await eventually(() => all.app.db.snapshot().waiting === 100, { withinMillis: 10_000 })
  for (const stream of streams) stream.reset()
  await areForgotten(t, all)
})

test('those who pipelined on one socket and left', async (t) => {
  const all = await crowd(t)
  await listen(all.app)
  const clients = await Promise.all(Array.from({ length: 20 }, () => openHttp(t, all.app)))
  for (const client of clients) for (let n = 0; n < 10; n++) client.send('GET', '/wait')
  await eventually(() => all.seen.length >= 20, { withinMillis: 10_000 })
  for (const client of clients) client.reset()
  await areForgotten(t, all)
})
