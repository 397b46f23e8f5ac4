import underPressure from '@fastify/under-pressure'
import type { FastifyInstance } from 'fastify'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { add } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* @fastify/under-pressure: a health check by snapshot() and ping(). */

const database = await createDatabase(t, { sql: NOTES })

/** Healthy as long as few wait; and where nobody does, as long as the database answers. It never waits in line itself. */
async function isHealthy(app: FastifyInstance): Promise<boolean> {
  const { waiting, idle, checkedOut, size, maxOverflow } = app.db.snapshot()
  if (waiting > size) return false
  // A pool in full use is busy, not ill: those who use it find out first if the database is gone.
  if (idle === 0 && checkedOut >= size + maxOverflow) return true
  return (await app.db.ping().catch(() => undefined)) !== undefined
}

async function watched(app: FastifyInstance): Promise<void> {
  await app.register(underPressure, {
    healthCheck: isHealthy,
    healthCheckInterval: 20,
    exposeStatusRoute: '/health',
  })
}

test('healthy, then the database is gone, then it is back', async (t) => {
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString }, watched)
  const status = async () => (await app.inject('/health')).statusCode
  await eventually(async () => (await status()) === 200, { withinMillis: 10_000 })
  await proxy.refuse()
  proxy.cut('reset')
  await eventually(async () => (await status()) === 503, { withinMillis: 10_000 })
  await proxy.accept()
  await eventually(async () => (await status()) === 200, { withinMillis: 10_000 })
})

test('a full pool is busy, one with a long queue is not healthy, and the check never stands in it', async (t) => {
  const goOn = gate()
  const app = await buildApp(t, database, { pool: { size: 1 } }, async (app) => {
    await watched(app)
    app.post('/hold', async ({ db }) => {
      await add(db, 'x')
      await goOn.opened
      return 'ok'
    })
  })
  const hold = () => app.inject({ method: 'POST', url: '/hold' })
  const first = hold()
  await eventually(() => app.db.snapshot().checkedOut === 1 && app.db.snapshot().holders[0]?.route === '/hold')
  t.equal(await isHealthy(app), true)
  t.equal(app.db.snapshot().waiting, 0)
  const second = hold()
  const third = hold()
  await eventually(() => app.db.snapshot().waiting === 2)
  t.equal(await isHealthy(app), false)
  await eventually(async () => (await app.inject('/health')).statusCode === 503, { withinMillis: 10_000 })
  goOn.open()
  for (const answer of await Promise.all([first, second, third])) t.ok([200, 503].includes(answer.statusCode))
  await eventually(async () => (await app.inject('/health')).statusCode === 200, { withinMillis: 10_000 })
})
