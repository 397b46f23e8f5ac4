import { type Count, entryOf, fiveFrom, itemOf } from './items.ts'

/** What the load asks of a server, over and over. */
export type Subject = 'untouched' | 'read' | 'update' | 'insert' | 'five' | 'held'

export interface Question {
  readonly method: 'GET' | 'POST' | 'PUT'
  readonly path: string
  readonly body?: string
  readonly status: number
  /** Whether the body of an answer is the right one. */
  isRight(body: string): boolean
}

/** About one item. Ask it again only when it has been answered: counts are remembered from answer to answer. */
export function question(subject: Subject, id: number): Question {
  switch (subject) {
    case 'untouched':
      return get(`/untouched/${id}`, JSON.stringify(itemOf(id)))
    case 'read':
      return get(`/items/${id}`, JSON.stringify(itemOf(id)))
    case 'held':
      return get(`/items/${id}/held`, JSON.stringify(itemOf(id)))
    case 'five':
      return get(`/items/${id}/five`, JSON.stringify(fiveFrom(id).map(itemOf)))
    case 'insert':
      return insert(id)
    case 'update':
      return { method: 'PUT', path: `/counts/${id}`, status: 200, isRight: counter(id) }
  }
}

function get(path: string, expected: string): Question {
  return { method: 'GET', path, status: 200, isRight: (body) => body === expected }
}

function insert(id: number): Question {
  const entry = JSON.stringify(entryOf(id))
  return { method: 'POST', path: '/entries', body: entry, status: 201, isRight: (body) => body === entry }
}

/** Nobody else updates this item, so every count goes on where the last one ended. */
function counter(id: number): (body: string) => boolean {
  let last: number | undefined
  return (body) => {
    const count = JSON.parse(body) as Count
    const right = count.id === id && count.after === count.before + 1 && (last ?? count.before) === count.before
    last = count.after
    return right
  }
}
