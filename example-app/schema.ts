import type { Generated, JSONColumnType } from 'kysely'
import type { Mail } from './mailer.ts'

interface AirportTable {
  iata: string
  name: string
  city: string
  country: string
}

/** One flight for each pair of airports. Its seats are what people compete for: a check keeps them from going below 0. */
interface FlightTable {
  id: Generated<number>
  origin: string
  destination: string
  seats_left: number
}

interface TripTable {
  id: Generated<number>
  passenger: string
  email: string
  status: Generated<'booked' | 'cancelled'>
  booked_at: Generated<Date>
}

interface LegTable {
  trip_id: number
  position: number
  flight_id: number
}

interface AuditTable {
  id: Generated<number>
  what: string
  at: Generated<Date>
}

/** Mails to be sent: see worker.ts. */
interface JobTable {
  id: Generated<number>
  mail: JSONColumnType<Mail>
  attempts: Generated<number>
  due_at: Generated<Date>
}

declare module 'fastify-request-db' {
  interface DatabaseSchema {
    airports: AirportTable
    flights: FlightTable
    trips: TripTable
    legs: LegTable
    audit: AuditTable
    jobs: JobTable
  }
}
