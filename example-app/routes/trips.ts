import type { FastifyInstance } from 'fastify'
import type { Mailer } from '../mailer.ts'
import { type Booking, bookTrip, cancelTrip, getTrip, listTrips } from '../repositories/trips.ts'
import { iata, id, limit, text } from './schemas.ts'

const leg = {
  type: 'object',
  additionalProperties: false,
  required: ['from', 'to'],
  properties: { from: iata, to: iata, optional: { type: 'boolean' } },
}

const booking = {
  body: {
    type: 'object',
    additionalProperties: false,
    required: ['passenger', 'email', 'legs'],
    properties: {
      passenger: text(100),
      email: { type: 'string', maxLength: 200, format: 'email' },
      legs: { type: 'array', minItems: 1, maxItems: 10, items: leg },
    },
  },
}

const one = { params: { type: 'object', required: ['id'], properties: { id } } }

const page = {
  querystring: { type: 'object', additionalProperties: false, properties: { limit, before: id } },
}

const readOnly = { db: { readOnly: true } }

export async function tripRoutes(app: FastifyInstance, { mailer }: { mailer: Mailer }): Promise<void> {
  app.post<{ Body: Booking }>('/trips', { schema: booking }, async ({ db, body }, reply) => {
    const trip = await bookTrip(db, body)
    // Not before it is certain: a booking that fails sends no mail.
    db.afterCommit(() => mailer.send({ to: trip.email, subject: `Your trip ${trip.id} is booked` }))
    reply.code(201).header('location', `/trips/${trip.id}`)
    return trip
  })

  app.get<{ Params: { id: number } }>('/trips/:id', { schema: one, config: readOnly }, ({ db, params }) =>
    getTrip(db, params.id),
  )

  app.get<{ Querystring: { limit: number; before?: number } }>(
    '/trips',
    { schema: page, config: readOnly },
    async ({ db, query }) => {
      // One more than asked for tells whether there is a next page.
      const trips = await listTrips(db, query.limit + 1, query.before)
      const shown = trips.slice(0, query.limit)
      const next = trips.length > shown.length ? `/trips?limit=${query.limit}&before=${shown.at(-1)?.id}` : null
      return { trips: shown, next }
    },
  )

  app.delete<{ Params: { id: number } }>('/trips/:id', { schema: one }, ({ db, params }) => cancelTrip(db, params.id))
}
