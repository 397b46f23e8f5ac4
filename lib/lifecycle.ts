import { IncomingMessage } from 'node:http'
import { Http2ServerRequest } from 'node:http2'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { sessionInAttempt } from './attempts.ts'
import { type Context, contextOf, hearWithin, within } from './context.ts'
import type { Engine } from './engine.ts'
import { SessionEnded } from './errors.ts'
import { currentOrigin, enterOrigin, isInside, isTracked, isTrackedFully, Origin, runInside } from './observe/origin.ts'
import type { Who } from './observe/snapshot.ts'
import { isStream } from './payload.ts'
import {
  AFTER_ANSWER,
  AFTER_ERROR,
  type Leave,
  RequestSession,
  type RequestSlots,
  type Slotted,
} from './request-session.ts'
import type { Session } from './session/session.ts'

type Done = () => void

/** When a request's session settles: the hooks, as plain functions of request and reply. */
export class Lifecycle {
  readonly slots: RequestSlots
  readonly #engine: Engine
  readonly #name: string

  constructor(engine: Engine) {
    const { name } = engine.options.pool
    const slot = (what: string) => Symbol(`fastify-request-db ${name} ${what}`)
    this.slots = {
      reply: slot('reply'),
      session: slot('session'),
      payload: slot('payload'),
      over: slot('over'),
      route: slot('route'),
      origin: slot('origin'),
      context: slot('context'),
    }
    this.#engine = engine
    this.#name = name
  }

  /** `request.db`. */
  session(request: FastifyRequest): Session<unknown> {
    const session = this.open(request)
    return session.route.retry === undefined ? session.session : sessionInAttempt(session)
  }

  /** What is behind `request.db`: made when it is first looked at, so that a request without a use for it pays nothing. */
  open = (request: FastifyRequest): RequestSession => {
    const slots = request as unknown as Slotted
    const known = slots[this.slots.session] as RequestSession | null
    if (known) {
      // Fastify loses the context where it parses the body.
      if (known.origin !== undefined) enterOrigin(known.origin)
      return known
    }
    const reply = slots[this.slots.reply] as FastifyReply | null
    if (!reply) {
      throw new SessionEnded(
        this.#name,
        'it begins with the onRequest hook of fastify-request-db: register that before hooks that use it',
      )
    }
    const made = new RequestSession(this.#engine, request, reply, this.slots)
    if (isTracked()) {
      const origin = (slots[this.slots.origin] as Origin | null) ?? originOf(request, made.who)
      enterOrigin(origin)
      made.origin = origin
      slots[this.slots.origin] = origin
    }
    const over = slots[this.slots.over] as string | null
    if (over) void made.unit.settle('rollback', over)
    slots[this.slots.session] = made
    return made
  }

  onRequest = (request: FastifyRequest, reply: FastifyReply, done: Done): void => {
    const slots = request as unknown as Slotted
    slots[this.slots.reply] = reply
    if (this.#engine.options.asyncContext) this.#followed(request, reply, () => this.#track(request, done))
    else this.#track(request, done)
  }

  // Whatever the request sets off finds its session. What its streams tell comes from the socket, which is nobody's.
  #followed(request: FastifyRequest, reply: FastifyReply, go: Done): void {
    const context = contextOf(this.#name, request, () => this.session(request))
    ;(request as unknown as Slotted)[this.slots.context] = context
    hearWithin(context, request.raw)
    hearWithin(context, reply.raw)
    within(context, go)
  }

  /** preValidation, where contexts are followed: hooks before may have lost it, and the parser of the body has. */
  reenter = (request: FastifyRequest, _reply: FastifyReply, done: Done): void => {
    const context = (request as unknown as Slotted)[this.slots.context] as Context | null
    if (context === null) done()
    else within(context, done)
  }

  #track(request: FastifyRequest, done: Done): void {
    const slots = request as unknown as Slotted
    if (isTrackedFully()) {
      const { method, routeOptions, id: requestId } = request
      const origin = originOf(request, { method, route: routeOptions.url ?? '', requestId })
      slots[this.slots.origin] = origin
      runInside(origin, done)
    } else if (isTracked() && isInside() && !isInjected(request)) runInside(undefined, done)
    else done()
  }

  /** At the head of all onSend hooks: sees the payload before one of them turns it into something else. */
  onSendFirst = (request: FastifyRequest, _reply: FastifyReply, payload: unknown, done: Leave): void => {
    const slots = request as unknown as Slotted
    slots[this.slots.payload] ??= isStream(payload) ? 'stream' : 'plain'
    const session = slots[this.slots.session] as RequestSession | null
    if (session === null || session.isMarked) done()
    else session.send(payload, done)
  }

  /** At the end of a route's onSend hooks: an error in any of the others still rolls back. */
  onSendLast = (request: FastifyRequest, _reply: FastifyReply, payload: unknown, done: Leave): void => {
    const session = (request as unknown as Slotted)[this.slots.session] as RequestSession | null
    if (session === null) done()
    else session.send(payload, done)
  }

  /** Only begins the rollback: while Fastify waits for an onError hook, any further `reply.send` ends the process. */
  onError = (request: FastifyRequest, _reply: FastifyReply, error: unknown, done: Done): void => {
    const slots = request as unknown as Slotted
    slots[this.slots.over] ??= AFTER_ERROR
    ;(slots[this.slots.session] as RequestSession | null)?.fail(error)
    done()
  }

  onResponse = (request: FastifyRequest, _reply: FastifyReply, done: Done): Promise<void> | void => {
    const slots = request as unknown as Slotted
    slots[this.slots.over] ??= AFTER_ANSWER
    const origin = slots[this.slots.origin] as Origin | null
    if (origin !== null) origin.answeredAt = performance.now()
    const ended = (slots[this.slots.session] as RequestSession | null)?.respond()
    return ended === undefined ? done() : ended
  }
}

// Only an injected request has a caller here. What one that comes over a socket finds is the mark of the one before it.
const isInjected = ({ raw }: { readonly raw: object }): boolean =>
  !(raw instanceof IncomingMessage || raw instanceof Http2ServerRequest)

function originOf(request: FastifyRequest, who: Who): Origin {
  const outer = isInjected(request) ? currentOrigin() : undefined
  return new Origin(who, outer?.answeredAt === 0 ? outer : undefined)
}
