import { STATUS_CODES } from 'node:http'
import type { FastifyError, FastifyReply, FastifyRequest } from 'fastify'
import { NoSuchFlight, SoldOut } from '../repositories/flights.ts'
import { NoSuchTrip } from '../repositories/trips.ts'

/** What a failure of the repositories means in HTTP, of which they know nothing. */
const STATUS_OF = new Map<unknown, number>([
  [NoSuchTrip, 404],
  [SoldOut, 409],
  [NoSuchFlight, 422],
])

export function answerFailure(error: FastifyError, request: FastifyRequest, reply: FastifyReply): void {
  const status = STATUS_OF.get(error.constructor)
  if (status) {
    reply.code(status).send({ statusCode: status, error: STATUS_CODES[status], message: error.message })
  } else if (error.validation || error.code?.startsWith('FST_')) {
    reply.send(error)
  } else {
    // What PostgreSQL says of our tables is for the log.
    request.log.error(error)
    reply.code(500).send({ statusCode: 500, error: STATUS_CODES[500], message: 'Something went wrong here' })
  }
}
