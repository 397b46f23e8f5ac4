import { Readable } from 'node:stream'
import requestDb, { type Session } from 'fastify-request-db'
import { type Connect, type Handle, INSERT } from '../contender.ts'
import { queryOf } from './kysely.ts'

/** This plugin. */
const ours: Connect = async (app, { connectionString, size, timeoutMillis, options }) => {
  await app.register(requestDb, { connectionString, pool: { size, timeoutMillis }, ...options })

  return {
    route: (options, handler) =>
      app.route({ ...options, handler: (request, reply) => handler(handleOf(request.db), request, reply) }),
    stream: (url) =>
      app.get(url, async ({ db }) => {
        await queryOf(db)(INSERT, ['streamed'])
        return Readable.from(lines(db))
      }),
  }
}

async function* lines(db: Session): AsyncGenerator<string> {
  const rows = db
    .withTables<{ numbers: { n: number; filler: string } }>()
    .selectFrom('numbers')
    .select(['n', 'filler'])
    .stream(100)
  for await (const row of rows) yield `${JSON.stringify(row)}\n`
}

const handleOf = (db: Session): Handle => ({
  query: queryOf(db),
  nested: (work) => db.transaction().execute((trx) => work(queryOf(trx))),
})

export default ours
