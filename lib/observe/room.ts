/** How a pool may grow, in each of so many processes. */
export interface Fleet {
  readonly processes: number
  readonly size: number
  readonly maxOverflow: number
}

/** The connections that all pools together can come to hold. */
export const neededBy = ({ processes, size, maxOverflow }: Fleet): number => processes * (size + maxOverflow)

/**
 * The largest pool for each process with which all of them fit into `room` connections: the same overflow with fewer
 * connections kept, or where that would leave none, no overflow. Undefined where not even one connection each fits.
 */
export function largestFit({ processes, maxOverflow }: Fleet, room: number): Omit<Fleet, 'processes'> | undefined {
  const each = Math.floor(room / processes)
  if (each < 1) return undefined
  return each > maxOverflow ? { size: each - maxOverflow, maxOverflow } : { size: each, maxOverflow: 0 }
}
