import { AsyncLocalStorage } from 'node:async_hooks'
import type { FastifyRequest, RouteHandlerMethod } from 'fastify'
import type { EffectiveRetry } from './options.ts'
import type { Found, RequestSession } from './request-session.ts'
import { backOff, exhausted, isWorthAnother } from './retry.ts'
import type { Session } from './session/session.ts'

interface Attempt {
  readonly of: RequestSession
  readonly session: Session<unknown>
}

// What is left running of an attempt that has failed must not get at the session of the next one.
const attempts = new AsyncLocalStorage<Attempt>()

/** The session that `request.db` is for the running code, in a route that can have several, one after the other. */
export function sessionInAttempt(session: RequestSession): Session<unknown> {
  const attempt = attempts.getStore()
  return attempt?.of === session ? attempt.session : session.session
}

/**
 * A handler that runs again in a new transaction after an error that is worth it, as long as nobody has been answered and
 * nothing was kept. Its COMMIT comes right behind it, before the answer is made, because it can run again only there.
 */
export function retrying(
  handler: RouteHandlerMethod,
  retry: EffectiveRetry,
  open: (request: FastifyRequest) => RequestSession,
): RouteHandlerMethod {
  return function (request, reply) {
    const session = open(request)
    // What a hook has written would be undone with the first attempt, and not written again.
    const isFresh = !session.unit.hasWritten && !session.unit.hasCommitted
    const found: Found = { statusCode: reply.statusCode, headers: { ...reply.getHeaders() } }
    const attempt = () =>
      attempts.run({ of: session, session: session.session }, () => handler.call(this, request, reply))
    let first: unknown
    try {
      first = attempt()
    } catch (error) {
      first = Promise.reject(error)
    }
    // It answers by itself, with reply.send.
    if (!isThenable(first)) return first
    return run(attempt, first as Promise<unknown>, { session, request, retry, isFresh, found })
  } as RouteHandlerMethod
}

interface Running {
  readonly session: RequestSession
  readonly request: FastifyRequest
  readonly retry: EffectiveRetry
  readonly isFresh: boolean
  readonly found: Found
}

async function run(attempt: () => unknown, first: Promise<unknown>, running: Running): Promise<unknown> {
  const { session, request, retry } = running
  for (let count = 1, result: unknown = first; ; count++, result = attempt()) {
    try {
      const payload = await result
      await session.commitAhead(payload)
      return payload
    } catch (error) {
      if (!isWorthAnother(error, retry) || !session.isRepeatable) throw error
      if (!running.isFresh) {
        request.log.warn('request-db: not tried again, because a hook before the handler has written')
        throw error
      }
      if (count >= retry.attempts) throw exhausted(error, count, session.name)
      request.log.info({ err: error }, `request-db: attempt ${count} of ${retry.attempts} failed, and is made again`)
      await session.startAnew(running.found)
      await backOff(count)
      if (!session.isRepeatable) throw error
    }
  }
}

const isThenable = (value: unknown) => typeof (value as { then?: unknown } | null | undefined)?.then === 'function'
