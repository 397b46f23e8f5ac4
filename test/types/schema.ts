import type { ColumnType, Generated } from 'kysely'

// As a user of the published package does it.
declare module 'fastify-request-db' {
  interface DatabaseSchema {
    trips: { id: Generated<number>; note: string; booked_at: ColumnType<Date, string | undefined, never> }
    'billing.invoices': { id: Generated<string>; cents: number }
  }
}
