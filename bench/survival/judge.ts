import type { Answer } from './call.ts'
import type { Deed } from './scenario.ts'

/** What is seen when a scenario is over. */
export interface Seen {
  readonly deeds: readonly Deed[]
  readonly complaints: readonly string[]
  /** All notes in the database. */
  readonly notes: readonly string[]
  /** States of the backends that were not free a second later. */
  readonly left: readonly string[]
  readonly alive: boolean
  /** The answer to an ordinary request afterwards. */
  readonly next: Answer
}

export const SURVIVES = 'survives'

/** In a few words, what went wrong. */
export function verdictOf({ deeds, complaints, notes, left, alive, next }: Seen): string {
  if (!alive) return 'the process dies'
  const words = [...deeds.flatMap((deed) => wordsOf(deed, notes)), ...complaints]
  if (left.some((state) => state.startsWith('idle in transaction'))) words.push('a transaction stays open')
  if (left.includes('active')) words.push('its statement runs on')
  if (next === 'late') words.push('the next request hangs')
  else if (next === 'none') words.push('the next request is not answered')
  else if (next.status >= 400) words.push(`the next request gets ${next.status}`)
  return words.length === 0 ? SURVIVES : [...new Set(words)].join('; ')
}

function wordsOf(deed: Deed, all: readonly string[]): string[] {
  const { who, answer, answered } = deed
  const prefix = who ? `${who} ` : ''
  if (answer === 'late') return [`${prefix}hangs`]
  if (answered === 'nobody') return kept(deed, all) > 0 ? ['commits, though the client has left'] : []
  if (answer === 'none') return [who ? `${who} gets no answer` : 'no whole answer', ...rowsOf(deed, all, 'no answer')]
  const { status } = answer
  const rows = rowsOf(deed, all, String(status))
  if (rows.length > 0) return rows.map((words) => `${who ? `${who}: ` : ''}${words}`)
  if (answered === 'ok' && status >= 400) return [who ? `${who} gets ${status}` : `answers ${status}`]
  if (answered === 'error' && status < 400) return [`answers ${status}`]
  return []
}

/** What the database should not have, or has not. */
function rowsOf(deed: Deed, all: readonly string[], told: string): string[] {
  const isOk = typeof deed.answer === 'object' && deed.answer.status < 400
  const right = deed.kept ?? (isOk ? 'all' : 'none')
  if (right === 'all' && kept(deed, all) < deed.notes.length) return [`${told} and no row`]
  if (right === 'none' && kept(deed, all) > 0)
    return [isOk ? 'commits what failed' : `commits a row it answered ${told} for`]
  return []
}

const kept = ({ notes }: Deed, all: readonly string[]) => notes.filter((note) => all.includes(note)).length
