import type { Count, Entry, Item } from './items.ts'

/** The database of the benchmark, as Kysely wants to know it. */
export interface Schema {
  items: Item
  counts: { id: Count['id']; count: number }
  entries: Entry
}
