import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { streamTrips, type Trip } from '../repositories/trips.ts'

const FORMATS = {
  csv: { type: 'text/csv; charset=utf-8', lines: csvLines },
  ndjson: { type: 'application/x-ndjson; charset=utf-8', lines: ndjsonLines },
}
type Format = keyof typeof FORMATS

const schema = {
  querystring: {
    type: 'object',
    additionalProperties: false,
    properties: { format: { enum: Object.keys(FORMATS), default: 'csv' } },
  },
}

export async function exportRoute(app: FastifyInstance): Promise<void> {
  app.get<{ Querystring: { format: Format } }>(
    '/trips/export',
    { schema, config: { db: { readOnly: true } } },
    async ({ db, query }, reply) => {
      const { type, lines } = FORMATS[query.format]
      // The session lives until the last line is sent, or the client leaves.
      return reply.type(type).send(Readable.from(lines(streamTrips(db))))
    },
  )
}

async function* ndjsonLines(trips: AsyncIterable<Trip>): AsyncGenerator<string> {
  for await (const trip of trips) yield `${JSON.stringify(trip)}\n`
}

async function* csvLines(trips: AsyncIterable<Trip>): AsyncGenerator<string> {
  yield csvLine(['id', 'passenger', 'email', 'status', 'bookedAt', 'legs'])
  for await (const { id, passenger, email, status, bookedAt, legs } of trips) {
    const route = legs.map(({ from, to }) => `${from}-${to}`).join(' ')
    yield csvLine([String(id), passenger, email, status, bookedAt.toISOString(), route])
  }
}

function csvLine(fields: string[]): string {
  return `${fields.map(csvField).join(',')}\r\n`
}

/** As RFC 4180 has it; a spreadsheet would take what begins like a formula for one. */
function csvField(value: string): string {
  const harmless = /^[=+\-@]/.test(value) ? `'${value}` : value
  return /[",\r\n]/.test(harmless) ? `"${harmless.replaceAll('"', '""')}"` : harmless
}
