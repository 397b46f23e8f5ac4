import type { FastifyInstance } from 'fastify'
import { searchAirports } from '../repositories/airports.ts'
import { limit, text } from './schemas.ts'

const search = {
  querystring: {
    type: 'object',
    additionalProperties: false,
    required: ['q'],
    properties: { q: text(50), limit },
  },
}

export async function airportRoutes(app: FastifyInstance): Promise<void> {
  app.get<{ Querystring: { q: string; limit: number } }>(
    '/airports',
    { schema: search, config: { db: { readOnly: true } } },
    async ({ db, query }) => ({ airports: await searchAirports(db, query.q, query.limit) }),
  )
}
