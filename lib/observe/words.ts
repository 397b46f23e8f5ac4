import type { Facts } from './facts.ts'
import type { Who } from './snapshot.ts'

export const labelOf = ({ method, route }: { method: string; route: string }): string => `${method} ${route}`.trim()
export const seconds = (millis: number): string =>
  millis < 1000 ? `${Math.round(millis)} ms` : `${(millis / 1000).toFixed(1)} s`
export const many = (count: number, what: string): string => `${count} ${what}${count === 1 ? '' : 's'}`

/** The route that is responsible: of a session of `fastify.db`, that of the request it was opened in. */
export const ownerOf = (session: Who & { openedBy?: Who }): string => labelOf(session.openedBy ?? session)

/** Labels, the most frequent first. */
export function ranked(labels: readonly string[]): string[] {
  const counts = new Map<string, number>()
  for (const label of labels) counts.set(label, (counts.get(label) ?? 0) + 1)
  return Array.from(counts)
    .sort(([, a], [, b]) => b - a)
    .map(([label]) => label)
}

export const capacityOf = ({ snapshot }: Facts): number => snapshot.size + snapshot.maxOverflow

/** So many of the connections have to be leaked, or to wait for locks, for that to be the cause. */
export const enoughOf = (facts: Facts): number => Math.max(1, capacityOf(facts) / 4)
