import { AsyncLocalStorage } from 'node:async_hooks'
import type { EventEmitter } from 'node:events'
import { NoSession, SessionEnded } from './errors.ts'
import type { Session } from './session/session.ts'

/** Where running code belongs to: a request, or a session outside of one. */
export interface Context {
  /** The plugin's `decorator`. */
  readonly name: string
  /** The request; undefined for a session outside of one. */
  readonly request: object | undefined
  readonly session: () => Session<unknown>
  /** Around it, or of another registration in the same request. */
  readonly outer: Context | undefined
}

const contexts = new AsyncLocalStorage<Context | undefined>()
// The registrations that have said asyncContext, by name. Nothing here costs anything before the first.
const followed = new Set<string>()

/** From now on the sessions of this registration can be found. */
export function follow(name: string): void {
  followed.add(name)
}

/** The context of a request or session that begins here. */
export function contextOf(name: string, request: object | undefined, session: () => Session<unknown>): Context {
  const outer = contexts.getStore()
  // A request that a handler injects is not a part of the one that injects it.
  const isPart = request === undefined || outer?.request === request
  return { name, request, session, outer: isPart ? outer : undefined }
}

/** Runs `fn`, and all that it sets off, inside. */
export function within<T>(context: Context, fn: () => T): T {
  return contexts.run(context, fn)
}

/** Has the listeners of an emitter that others feed, such as a socket, run inside. */
export function hearWithin(context: Context, emitter: EventEmitter): void {
  const { emit } = emitter
  emitter.emit = function (this: EventEmitter, ...args) {
    return contexts.run(context, () => emit.apply(this, args))
  }
}

/** Runs `fn` for everybody's good: what it sets off belongs to no request, and keeps none in memory. */
export function withoutContext<T>(fn: () => T): T {
  return followed.size === 0 ? fn() : contexts.exit(fn)
}

/** Whether anybody's context is kept. */
export const isFollowing = (): boolean => followed.size > 0

/** The session that the running code belongs to. @throws NO_SESSION, SESSION_ENDED */
export function findSession(name: string): Session<unknown> {
  let context = contexts.getStore()
  while (context !== undefined && context.name !== name) context = context.outer
  if (context === undefined) {
    const why = followed.has(name)
      ? 'call it inside a request, or inside fastify.db.session(fn)'
      : 'register the plugin with asyncContext: true'
    throw new NoSession(name, why)
  }
  const session = context.session()
  if (session.state === 'ended') throw new SessionEnded(name, 'what still runs here has outlived it')
  return session
}
