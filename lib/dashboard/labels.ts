import type { Who } from '../observe/snapshot.ts'

/** What a session is called on the page: `GET /trips/:id`, or its name and the request it was opened in. */
export function labelOf(who: Pick<Who, 'method' | 'route'>, openedBy?: Who | undefined): string {
  const label = `${who.method} ${who.route}`.trim()
  return cut(openedBy === undefined ? label : `${label} in ${labelOf(openedBy)}`, 120)
}

/** Text of a bounded length. */
export function cut(text: string, length: number): string {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text
}
