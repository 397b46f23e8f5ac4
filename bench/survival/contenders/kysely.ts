import { Readable } from 'node:stream'
import { CompiledQuery, Kysely, PostgresDialect, type QueryResult } from 'kysely'
import pg from 'pg'
import { type Connect, type Handle, INSERT, nestedByHand, numbers, type Query } from '../contender.ts'

/** Kysely over `pg`, with `db.transaction().execute`; streams with `db.startTransaction()`. */
const overPg: Connect = async (app, { connectionString, size, timeoutMillis }) => {
  const pool = new pg.Pool({ connectionString, max: size, connectionTimeoutMillis: timeoutMillis })
  pool.on('error', (error) => app.log.error(error))
  const db = new Kysely<unknown>({ dialect: new PostgresDialect({ pool }) })
  app.addHook('onClose', () => db.destroy())

  // A stream outlives its handler, so it has a transaction of its own. Who leaves has the generator return at its yield.
  async function* rows(): AsyncGenerator<string> {
    const trx = await db.startTransaction().execute()
    try {
      await queryOf(trx)(INSERT, ['streamed'])
      yield* numbers(queryOf(trx))
      await trx.commit().execute()
    } finally {
      if (!trx.isCommitted) await trx.rollback().execute()
    }
  }

  return {
    route: (options, handler) =>
      app.route({
        ...options,
        handler: (request, reply) => db.transaction().execute((trx) => handler(handleOf(trx), request, reply)),
      }),
    stream: (url) => app.get(url, (_request, reply) => reply.send(Readable.from(rows()))),
  }
}

interface Executor {
  executeQuery<R>(query: CompiledQuery<R>): Promise<QueryResult<R>>
}

export const queryOf =
  (db: Executor): Query =>
  async (text, values = []) =>
    (await db.executeQuery(CompiledQuery.raw(text, [...values]) as CompiledQuery<object>)).rows

function handleOf(trx: Executor): Handle {
  const query = queryOf(trx)
  return { query, nested: nestedByHand(query) }
}

export default overPg
