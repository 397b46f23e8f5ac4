import pg from 'pg'
import { argumentOfParent, serveParent } from './child.ts'

/*
 * What the connections could do at best: they ask for nothing but `select 1`, each again as soon as it is answered. A
 * pool's efficiency is measured against this.
 */

export interface BareArgument {
  readonly connectionString: string
  readonly connections: number
}

export interface BareLoad {
  /** How many of the connections ask. */
  readonly connections: number
  readonly warmUpMillis: number
  readonly millis: number
}

const { connectionString, connections } = argumentOfParent<BareArgument>()
const clients = Array.from({ length: connections }, () => new pg.Client({ connectionString }))
await Promise.all(clients.map((client) => client.connect()))

/** Round trips per second, of all connections together. */
async function loop(load: BareLoad): Promise<number> {
  const countFrom = performance.now() + load.warmUpMillis
  const countUntil = countFrom + load.millis
  let roundTrips = 0
  const ask = async (client: pg.Client) => {
    while (performance.now() < countUntil) {
      await client.query('select 1')
      const now = performance.now()
      if (now >= countFrom && now < countUntil) roundTrips++
    }
  }
  await Promise.all(clients.slice(0, load.connections).map(ask))
  return (roundTrips / load.millis) * 1000
}

const calls = { loop }
export type BareCalls = typeof calls
serveParent(calls)
