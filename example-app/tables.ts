import type { Session } from 'fastify-request-db'
import { sql } from 'kysely'

export const SEATS_LEFT_CHECK = 'flights_seats_left_check'

/** Makes the tables that are missing. Safe to run at every start, also by several processes at once. */
export async function createTables(session: Session): Promise<void> {
  // `if not exists` alone is no protection against a second process: held until the commit.
  await sql`select pg_advisory_xact_lock(hashtext('example-app tables'))`.execute(session)
  const { schema } = session
  await schema
    .createTable('airports')
    .ifNotExists()
    .addColumn('iata', 'text', (column) => column.primaryKey())
    .addColumn('name', 'text', (column) => column.notNull())
    .addColumn('city', 'text', (column) => column.notNull())
    .addColumn('country', 'text', (column) => column.notNull())
    .execute()
  await schema
    .createTable('flights')
    .ifNotExists()
    .addColumn('id', 'integer', (column) => column.primaryKey().generatedAlwaysAsIdentity())
    .addColumn('origin', 'text', (column) => column.notNull().references('airports.iata'))
    .addColumn('destination', 'text', (column) => column.notNull().references('airports.iata'))
    .addColumn('seats_left', 'integer', (column) => column.notNull())
    .addUniqueConstraint('flights_origin_destination', ['origin', 'destination'])
    .addCheckConstraint(SEATS_LEFT_CHECK, sql`seats_left >= 0`)
    .execute()
  await schema
    .createTable('trips')
    .ifNotExists()
    .addColumn('id', 'integer', (column) => column.primaryKey().generatedAlwaysAsIdentity())
    .addColumn('passenger', 'text', (column) => column.notNull())
    .addColumn('email', 'text', (column) => column.notNull())
    .addColumn('status', 'text', (column) => column.notNull().defaultTo('booked'))
    .addColumn('booked_at', 'timestamptz', (column) => column.notNull().defaultTo(sql`now()`))
    .execute()
  await schema
    .createTable('legs')
    .ifNotExists()
    .addColumn('trip_id', 'integer', (column) => column.notNull().references('trips.id'))
    .addColumn('position', 'integer', (column) => column.notNull())
    .addColumn('flight_id', 'integer', (column) => column.notNull().references('flights.id'))
    .addPrimaryKeyConstraint('legs_pkey', ['trip_id', 'position'])
    .execute()
  await schema
    .createTable('audit')
    .ifNotExists()
    .addColumn('id', 'integer', (column) => column.primaryKey().generatedAlwaysAsIdentity())
    .addColumn('what', 'text', (column) => column.notNull())
    .addColumn('at', 'timestamptz', (column) => column.notNull().defaultTo(sql`now()`))
    .execute()
  await schema
    .createTable('jobs')
    .ifNotExists()
    .addColumn('id', 'integer', (column) => column.primaryKey().generatedAlwaysAsIdentity())
    .addColumn('mail', 'jsonb', (column) => column.notNull())
    .addColumn('attempts', 'integer', (column) => column.notNull().defaultTo(0))
    .addColumn('due_at', 'timestamptz', (column) => column.notNull().defaultTo(sql`now()`))
    .execute()
}
