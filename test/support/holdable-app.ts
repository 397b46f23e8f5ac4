import type { FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import type { PoolOptions } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import type { Database } from './database.ts'
import { eventually } from './eventually.ts'
import { gate } from './gate.ts'
import { pidOf } from './notebook.ts'

/**
 * An app whose connections can be used up: `GET /` asks once, `hold()` sends a request that has its connection when
 * this resolves and keeps it until `release()`.
 */
export async function buildHoldableApp(
  t: Test,
  database: Database,
  pool: PoolOptions,
  routes: (app: FastifyInstance) => unknown = () => {},
) {
  const released = gate()
  // A pool that waits for 20 ms only must not be in such a hurry to connect.
  const connection = { connectionString: database.connectionString, connectionTimeoutMillis: 10_000 }
  const app = await buildApp(t, database, { pool, connection }, async (app) => {
    app.get('/', ({ db }) => pidOf(db))
    app.get('/hold', async ({ db }) => {
      const pid = await pidOf(db)
      await released.opened
      return pid
    })
    await routes(app)
  })
  const hold = async () => {
    const { checkedOut } = app.db.snapshot()
    const answer = app.inject('/hold')
    void answer.catch(() => {})
    await eventually(
      () =>
        app.db.snapshot().checkedOut > checkedOut &&
        app.db.snapshot().holders.every(({ statements }) => statements > 0),
    )
    return { answer }
  }
  return { app, hold, release: () => released.open() }
}
