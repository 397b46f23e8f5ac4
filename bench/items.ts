/** Rows of the tables that are read and updated. */
export const ITEMS = 10_000
/** A large answer: more than the buffers of the kernel take (4 MB on Linux), or no server would notice a slow reader. */
export const LARGE_BYTES = 6_000_000

/** What is read. Computed from its number, so that everybody can tell a right answer from a wrong one. */
export interface Item {
  readonly id: number
  readonly name: string
  readonly price: number
}

/** What an update answers: the count as it was read, and as it was after one was added to it. */
export interface Count {
  readonly id: number
  readonly before: number
  readonly after: number
}

/** What is inserted. */
export interface Entry {
  readonly item: number
  readonly note: string
}

export function itemOf(id: number): Item {
  return { id, name: `item ${id}`, price: (id * 7919) % 10_000 }
}

export function entryOf(item: number): Entry {
  return { item, note: `a note on item ${item}` }
}

/** The five items that are read together: the first is the one that was asked for. */
export function fiveFrom(id: number): number[] {
  return [0, 1, 2, 3, 4].map((step) => ((id - 1 + step * (ITEMS / 5)) % ITEMS) + 1)
}
