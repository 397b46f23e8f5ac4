import type { FastifyInstance } from 'fastify'
import { eventually } from './eventually.ts'

/** Waits until the app's server has noticed that all of its clients are gone. */
export async function allHaveLeft(app: FastifyInstance): Promise<void> {
  await eventually(async () => (await openSockets(app)) === 0)
}

function openSockets(app: FastifyInstance): Promise<number> {
  return new Promise((resolve, reject) => {
    app.server.getConnections((error, count) => (error ? reject(error) : resolve(count)))
  })
}
