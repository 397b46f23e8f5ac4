import { contextOf, within } from './context.ts'
import type { EffectiveRetry } from './options.ts'
import { backOff, exhausted, isWorthAnother } from './retry.ts'
import type { Session } from './session/session.ts'
import type { UnitOfWork } from './session/transaction.ts'

const RETURNED = 'its function has returned'
const THREW = 'its function has thrown'
const ABORTED = 'its signal was aborted, or its deadline has passed'

/** A session outside of a request: how one attempt of it is made, and how long and how often. */
export interface Job<DB, Result> {
  readonly name: string
  readonly fn: (session: Session<DB>) => Promise<Result>
  readonly make: () => [UnitOfWork, Session<DB>]
  readonly retry: EffectiveRetry | undefined
  readonly signal: AbortSignal | undefined
  readonly deadlineMillis: number | undefined
  readonly isFollowed: boolean
  readonly onRetry: (error: unknown, attempt: number) => void
}

/** Runs the job: commits when its function resolves, rolls back when it rejects, or when nobody waits for it any more. */
export async function runJob<DB, Result>(job: Job<DB, Result>): Promise<Result> {
  const { signal, deadlineMillis } = job
  if (signal === undefined && deadlineMillis === undefined) return attempts(job, undefined)
  signal?.throwIfAborted()
  const controller = new AbortController()
  const unlisten = signal && whenAborted(signal, () => controller.abort(signal.reason))
  const timer = deadlineMillis && setTimeout(() => controller.abort(overdue(deadlineMillis)), deadlineMillis)
  try {
    return await attempts(job, controller.signal)
  } finally {
    clearTimeout(timer)
    unlisten?.()
  }
}

/** Who waits for one signal. */
interface Waiting {
  readonly listeners: Set<() => void>
  readonly tell: () => void
}

// One listener a signal, however many jobs share it: Node warns of more than ten.
const waiting = new WeakMap<AbortSignal, Waiting>()

function waitingFor(signal: AbortSignal): Waiting {
  const known = waiting.get(signal)
  if (known !== undefined) return known
  const listeners = new Set<() => void>()
  const tell = () => {
    for (const listener of [...listeners]) listener()
  }
  const made = { listeners, tell }
  waiting.set(signal, made)
  return made
}

/** Calls `listener` when the signal aborts, unless what is returned is called before. */
function whenAborted(signal: AbortSignal, listener: () => void): () => void {
  const { listeners, tell } = waitingFor(signal)
  if (listeners.size === 0) signal.addEventListener('abort', tell, { once: true })
  listeners.add(listener)
  return () => {
    listeners.delete(listener)
    if (listeners.size === 0) signal.removeEventListener('abort', tell)
  }
}

// As AbortSignal.timeout has it.
function overdue(millis: number): DOMException {
  return new DOMException(`The session did not end within deadlineMillis (${millis})`, 'TimeoutError')
}

async function attempts<DB, Result>(job: Job<DB, Result>, signal: AbortSignal | undefined): Promise<Result> {
  for (let count = 1; ; count++) {
    const [unit, session] = job.make()
    try {
      return await untilAborted(unit, signal, () => attempt(job, unit, session))
    } catch (error) {
      const { retry } = job
      // Its COMMIT was asked for, and not sent.
      if (signal?.aborted && (error as { code?: unknown }).code === 'FST_REQUEST_DB_SESSION_ENDED') throw signal.reason
      if (signal?.aborted || !retry || unit.hasCommitted || !isWorthAnother(error, retry)) throw error
      if (count >= retry.attempts) throw exhausted(error, count, job.name)
      job.onRetry(error, count)
      await backOff(count, signal).catch(() => signal?.throwIfAborted())
    }
  }
}

async function attempt<DB, Result>(job: Job<DB, Result>, unit: UnitOfWork, session: Session<DB>): Promise<Result> {
  const { fn } = job
  try {
    const inside = () => fn(session)
    const found = () => session as unknown as Session<unknown>
    const result = await (job.isFollowed ? within(contextOf(job.name, undefined, found), inside) : inside())
    await unit.settle('commit', RETURNED)
    return result
  } catch (error) {
    await unit.settle('rollback', THREW)?.catch(() => {})
    throw error
  }
}

/** What `run` comes to, or the reason of the abort, as soon as nothing is held any more. */
async function untilAborted<T>(unit: UnitOfWork, signal: AbortSignal | undefined, run: () => Promise<T>): Promise<T> {
  if (signal === undefined) return run()
  signal.throwIfAborted()
  let onAbort = () => {}
  const aborted = new Promise<never>((_, reject) => {
    onAbort = () => {
      // Once COMMIT is sent it stands, and the job is told how it ended.
      const isStanding = unit.outcome === 'commit'
      const abandoned = unit.abandon(ABORTED)
      if (!isStanding) void abandoned.then(() => reject(signal.reason))
    }
  })
  signal.addEventListener('abort', onAbort, { once: true })
  try {
    return await Promise.race([run(), aborted])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}
