import type { Booking } from './repositories/trips.ts'

/** Something to try at once: search, book, export. */
export function curlLines(url: string, [first, second]: Booking['legs']): string[] {
  const legs = [first, second && { ...second, optional: true }].filter((leg) => leg !== undefined)
  const booking: Booking = { passenger: 'Ada Lovelace', email: 'ada@example.org', legs }
  return [
    `curl '${url}/airports?q=london'`,
    `curl '${url}/trips' -H 'content-type: application/json' -d '${JSON.stringify(booking)}'`,
    `curl '${url}/trips/export'`,
  ]
}
