import type { Generated } from 'kysely'

/** What most tests write to; named so that it does not meet the example app's tables in `DatabaseSchema`. */
declare module '../../lib/index.ts' {
  interface DatabaseSchema {
    notes: { id: Generated<number>; note: string }
  }
}

/** For `createDatabase(t, { sql: NOTES })`. */
export const NOTES = 'create table notes (id int generated always as identity primary key, note text not null)'
