/** One time with a connection. Durations in milliseconds. */
interface Held {
  readonly waitedMillis: number
  heldMillis(at: number): number
  busyMillis(at: number): number
}

/** The header's value, up to now: waiting for connections, holding them, and of that waiting for the server. */
export function serverTiming(held: readonly Held[]): string | undefined {
  if (held.length === 0) return undefined
  const at = performance.now()
  let wait = 0
  let hold = 0
  let busy = 0
  for (const one of held) {
    wait += one.waitedMillis
    hold += one.heldMillis(at)
    busy += one.busyMillis(at)
  }
  return `db-wait;dur=${wait.toFixed(1)}, db-hold;dur=${hold.toFixed(1)}, db-busy;dur=${busy.toFixed(1)}`
}
