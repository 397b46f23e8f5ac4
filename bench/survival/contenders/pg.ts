import { Readable } from 'node:stream'
import pg from 'pg'
import { type Connect, type Handle, INSERT, nestedByHand, numbers, type Query } from '../contender.ts'

/** `pg` by hand, with care: what ROLLBACK could not be sent on is not given back to the pool. */
const handWritten: Connect = async (app, { connectionString, size, timeoutMillis }) => {
  const pool = new pg.Pool({ connectionString, max: size, connectionTimeoutMillis: timeoutMillis })
  pool.on('error', (error) => app.log.error(error))
  app.addHook('onClose', () => pool.end())

  async function transaction<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
    const client = await pool.connect()
    let broken: Error | undefined
    try {
      await client.query('BEGIN')
      const result = await work(client)
      await client.query('COMMIT')
      return result
    } catch (error) {
      await client.query('ROLLBACK').catch((reason: Error) => {
        broken = reason
      })
      throw error
    } finally {
      client.release(broken)
    }
  }

  // A stream outlives its handler, so it has a transaction of its own. Who leaves has the generator return at its yield.
  async function* rows(): AsyncGenerator<string> {
    const client = await pool.connect()
    let isOpen = true
    let broken: Error | undefined
    try {
      await client.query('BEGIN')
      await client.query(INSERT, ['streamed'])
      yield* numbers(queryOf(client))
      await client.query('COMMIT')
      isOpen = false
    } finally {
      const rollback = isOpen ? client.query('ROLLBACK') : undefined
      await rollback?.catch((reason: Error) => {
        broken = reason
      })
      client.release(broken)
    }
  }

  return {
    route: (options, handler) =>
      app.route({
        ...options,
        handler: (request, reply) => transaction((client) => handler(handleOf(client), request, reply)),
      }),
    stream: (url) => app.get(url, (_request, reply) => reply.send(Readable.from(rows()))),
  }
}

export const queryOf =
  (client: pg.PoolClient): Query =>
  async (text, values = []) =>
    (await client.query<object>(text, [...values])).rows

export function handleOf(client: pg.PoolClient): Handle {
  const query = queryOf(client)
  return { query, nested: nestedByHand(query) }
}

export default handWritten
