import { setTimeout as pause } from 'node:timers/promises'
import { RetriesExhausted } from './errors.ts'
import type { EffectiveRetry } from './options.ts'

const OWN = 'FST_REQUEST_DB_'
const MOST_CAUSES = 8
const FIRST_PAUSE_MILLIS = 20
const LONGEST_PAUSE_MILLIS = 1000

/** The codes of an error and of what has caused it, ours without their prefix. */
function codesOf(error: unknown): string[] {
  const codes: string[] = []
  let at = error as { code?: unknown; cause?: unknown } | null | undefined
  for (let depth = 0; depth < MOST_CAUSES && typeof at === 'object' && at !== null; depth++) {
    if (typeof at.code === 'string') codes.push(at.code.replace(OWN, ''))
    at = at.cause as typeof at
  }
  return codes
}

/** Whether another attempt is wanted after this error. */
export function isWorthAnother(error: unknown, { on }: EffectiveRetry): boolean {
  const codes = codesOf(error)
  // What may have been kept must not be done twice.
  if (codes.includes('COMMIT_UNKNOWN')) return false
  if (typeof on === 'function') return on(error as Error) === true
  return on.some((code) => codes.includes(code.replace(OWN, '')))
}

/** What is thrown after the last attempt: a 503 in any case. */
export function exhausted(error: unknown, attempts: number, pool: string): unknown {
  const isUnavailable = (error as { statusCode?: unknown } | null)?.statusCode === 503
  return isUnavailable ? error : new RetriesExhausted(attempts, pool, { cause: error })
}

/** Waits before the next attempt, the longer the more there were, and never as long as whoever failed at the same time. */
export function backOff(attempt: number, signal?: AbortSignal): Promise<void> {
  const longest = Math.min(LONGEST_PAUSE_MILLIS, FIRST_PAUSE_MILLIS * 2 ** (attempt - 1))
  return pause(Math.random() * longest, undefined, signal && { signal })
}
