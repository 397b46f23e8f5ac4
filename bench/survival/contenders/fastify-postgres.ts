import { Readable } from 'node:stream'
import fastifyPostgres from '@fastify/postgres'
import type { FastifyRequest } from 'fastify'
import type { PoolClient } from 'pg'
import { type Connect, INSERT, numbers } from '../contender.ts'
import { handleOf, queryOf } from './pg.ts'

/** `@fastify/postgres` with the route option `transact`. */
const withTransact: Connect = async (app, { connectionString, size, timeoutMillis }) => {
  await app.register(fastifyPostgres, { connectionString, max: size, connectionTimeoutMillis: timeoutMillis })
  app.pg.pool.on('error', (error) => app.log.error(error))
  const transact = { pg: { transact: true } }

  return {
    route: (options, handler) =>
      app.route({
        ...options,
        ...transact,
        handler: (request, reply) => handler(handleOf(clientOf(request)), request, reply),
      }),
    stream: (url) =>
      app.get(url, transact, async (request) => {
        const query = queryOf(clientOf(request))
        await query(INSERT, ['streamed'])
        return Readable.from(numbers(query))
      }),
  }
}

function clientOf({ pg }: FastifyRequest): PoolClient {
  if (!pg) throw new Error('The route has no transaction')
  return pg
}

export default withTransact
