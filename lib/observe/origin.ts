import { AsyncLocalStorage } from 'node:async_hooks'
import { fileURLToPath } from 'node:url'
import type { Who } from './snapshot.ts'

/** A request, as the sessions that are opened in it remember it. */
export class Origin {
  readonly who: Who
  /** The request whose handler injected this one. */
  readonly parent: Origin | undefined
  /** When its response was sent (monotonic); 0 before. */
  answeredAt = 0

  constructor(who: Who, parent?: Origin) {
    this.who = who
    this.parent = parent
  }
}

/** The request in which a session was opened; undefined where none is known, or it is the session of that request. */
export function openerOf(who: Who, origin: Origin | undefined): Who | undefined {
  if (origin === undefined || (who.requestId !== '' && who.requestId === origin.who.requestId)) return undefined
  return { ...origin.who }
}

const storage = new AsyncLocalStorage<Origin | undefined>()

// Up to Node 22 a store makes every promise of the process dearer, so it is not begun without need.
const isStoreFree = Number.parseInt(process.versions.node, 10) >= 24
let tracking: 'none' | 'sessions' | 'requests' = isStoreFree ? 'sessions' : 'none'

/** Who opened a session: known for nobody, for requests that have used theirs, or for all, with the stacks of check-outs. */
export const isTracked = (): boolean => tracking !== 'none'
export const isTrackedFully = (): boolean => tracking === 'requests'

/** From now on all requests are known to the sessions that are opened in them, and every check-out keeps its stack. */
export function trackFully(): void {
  tracking = 'requests'
}

export const currentOrigin = (): Origin | undefined => (tracking === 'none' ? undefined : storage.getStore())

/** What goes on from here belongs to this request. */
export function enterOrigin(origin: Origin): void {
  if (storage.getStore() !== origin) storage.enterWith(origin)
}

/** Whether what runs belongs to a request, by right or because another one has left its mark on the socket. */
export const isInside = (): boolean => storage.getStore() !== undefined

/** Runs the rest of a request as its own. */
export const runInside = (origin: Origin | undefined, run: () => void): void => storage.run(origin, run)

const FRAMES = 40
const OWN = [new URL('..', import.meta.url).href, fileURLToPath(new URL('..', import.meta.url))]
// What stands between the app and us, and what it all runs on.
const FOREIGN = /node_modules|\bnode:|<anonymous>\)?$/

/** A place in the app's code, from its stack. It is made into text only when somebody reads it. */
export class CallSite {
  readonly stack = ''

  constructor() {
    const { stackTraceLimit } = Error
    Error.stackTraceLimit = FRAMES
    Error.captureStackTrace(this, CallSite)
    Error.stackTraceLimit = stackTraceLimit
  }

  /** The app's own frames, innermost first, one a line. */
  toString(): string {
    const frames = this.stack.split('\n').slice(1)
    const apps = frames.filter((frame) => !FOREIGN.test(frame) && !OWN.some((own) => frame.includes(own)))
    return (apps.length > 0 ? apps : frames)
      .slice(0, 8)
      .map((frame) => frame.trim())
      .join('\n')
  }
}
