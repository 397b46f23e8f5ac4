import type { Socket } from 'node:net'
import type { FastifyBaseLogger, FastifyReply, FastifyRequest } from 'fastify'
import type { Engine } from './engine.ts'
import { InvalidOption, SessionEnded } from './errors.ts'
import type { Origin } from './observe/origin.ts'
import { serverTiming } from './observe/server-timing.ts'
import type { Who } from './observe/snapshot.ts'
import type { EffectiveOptions, EffectiveRouteOptions } from './options.ts'
import { isSendable, isStream, isWebResponse } from './payload.ts'
import type { Step } from './pool/flight.ts'
import type { Holding } from './pool/ledger.ts'
import type { Pool } from './pool/pool.ts'
import {
  type BeginOptions,
  beginStatement,
  isCommitCertain,
  ownSettings,
  routeSettings,
  settingsStep,
} from './session/begin.ts'
import { makeSession, type Session } from './session/session.ts'
import { type UnitHost, UnitOfWork } from './session/transaction.ts'

export const AFTER_ERROR =
  'the request failed and was rolled back; an error handler that must write uses fastify.db.session(fn)'
const AFTER_HANDLER = 'its handler has returned, and was committed'
const AFTER_ATTEMPT = 'its attempt has failed, and the handler runs again with a session of its own'
export const AFTER_ANSWER = 'the response has been sent'
const CLIENT_GONE = 'the client has disconnected'

/** The rule where `shouldCommit` says nothing else: an answer below 400 is a success. */
export function isSuccess(_request: FastifyRequest, reply: FastifyReply): boolean {
  return reply.statusCode < 400
}

// One `close` listener a socket, however many requests it carries: a socket can die with requests that no event tells of.
const bySocket = new WeakMap<Socket, Set<RequestSession>>()

function watchSocket(socket: Socket, session: RequestSession): Set<RequestSession> {
  let watched = bySocket.get(socket)
  if (watched === undefined) {
    const fresh = new Set<RequestSession>()
    socket.once('close', () => {
      for (const one of [...fresh]) one.gone()
    })
    bySocket.set(socket, fresh)
    watched = fresh
  }
  return watched.add(session)
}

/** What the plugin knows of a request. It lives on the request under symbols of its registration. */
export interface RequestSlots {
  readonly reply: symbol
  readonly session: symbol
  /** The kind of payload that the first onSend saw; none when there was no onSend. */
  readonly payload: symbol
  /** Why a session that is opened now is over already. */
  readonly over: symbol
  /** In a route's config: its options. It also marks a route whose last onSend hook is ours. */
  readonly route: symbol
  /** What sessions that are opened in the request know of it. */
  readonly origin: symbol
  /** Where the request's session can be found from, where that is wanted. */
  readonly context: symbol
}

export type Slotted = Record<symbol, unknown>

// These speak of the answer that was to be; the error that takes its place must not be cached or followed.
const HEADERS_OF_SUCCESS = ['cache-control', 'etag', 'expires', 'last-modified', 'location', 'content-location', 'age']

type Headers = ReturnType<FastifyReply['getHeaders']>

/** A reply as a handler finds it. */
export interface Found {
  readonly statusCode: number
  readonly headers: Headers
}

/** Lets an answer leave, or, with an error, that in its place. */
export type Leave = (error?: Error) => void

/** One request's session and its end. Every road leads to `unit.settle`. */
export class RequestSession implements UnitHost {
  unit: UnitOfWork
  session: Session<unknown>
  readonly route: EffectiveRouteOptions
  /** Our last onSend hook is the last of its route. */
  readonly isMarked: boolean
  readonly who: Who
  origin: Origin | undefined
  readonly holdings: Holding[] | undefined
  readonly isCommitCertain: boolean
  readonly #options: EffectiveOptions
  readonly #pool: Pool
  readonly #begin: BeginOptions
  readonly #beginSql: string | undefined
  readonly #isReadOnly: boolean
  readonly #request: FastifyRequest
  readonly #reply: FastifyReply
  readonly #slots: RequestSlots
  readonly name: string
  #watched: Set<RequestSession> | undefined
  #isUsed = false
  #isFailed = false
  // The one error after which the handler still runs, and may answer before a slow error handler does.
  #isTimedOut = false
  #isAnswering = false
  #flushed: Promise<void> | undefined
  // The headers of the answer that waits for its COMMIT, where an error has come behind it.
  #interrupted: Headers | undefined
  // An answer has passed our hook. In the 404 of `reply.callNotFound()` it passes twice.
  #hasLeft = false
  #isFinished = false
  // The error handler sets a status even when the headers have left.
  #saidStatus: number | undefined
  #timing: string | undefined
  #isAnswered = false

  constructor({ pool, options }: Engine, request: FastifyRequest, reply: FastifyReply, slots: RequestSlots) {
    this.#request = request
    this.#reply = reply
    this.#slots = slots
    this.#pool = pool
    this.name = pool.options.name
    this.#options = options
    const { config, url } = request.routeOptions
    const own = (config as unknown as Slotted)[slots.route] as EffectiveRouteOptions | undefined
    this.isMarked = own !== undefined
    this.route = own ?? options.route
    const { autocommit, isolationLevel, deferrable, readOnly } = this.route
    this.#isReadOnly = typeof readOnly === 'function' ? readOnly(request) : readOnly
    this.#begin = { isolationLevel, deferrable, readOnly: this.#isReadOnly }
    this.who = { method: request.method, route: url ?? '', requestId: request.id }
    this.holdings = options.serverTiming ? [] : undefined
    this.isCommitCertain = isCommitCertain(this.#begin)
    this.#beginSql = autocommit ? undefined : beginStatement(this.#begin)
    ;[this.unit, this.session] = this.#make()
  }

  #make(): [UnitOfWork, Session<unknown>] {
    const unit = new UnitOfWork(this.#pool, this, this.#beginSql)
    return [unit, makeSession(unit, this.#begin, this.#options.plugins)]
  }

  // For attempts

  /** Whether the handler can run as if it had not run before: nobody is answered, nothing is kept, somebody waits. */
  get isRepeatable(): boolean {
    const isAnswered = this.#payload !== null || this.#reply.sent
    const isOver = this.#isFailed || (this.#request as unknown as Slotted)[this.#slots.over] !== null
    return !isAnswered && !isOver && !this.unit.hasCommitted && !isGone(this.#request, this.#reply)
  }

  /** Undoes all, and gives the handler a session and a reply as it found them. */
  async startAnew(found: Found): Promise<void> {
    await this.unit.settle('rollback', AFTER_ATTEMPT)?.catch(() => {})
    ;[this.unit, this.session] = this.#make()
    this.#restore(found.statusCode, found.headers)
  }

  /** Commits what is to be committed before its answer is made. What uses the session after that has a new one. */
  async commitAhead(payload: unknown): Promise<void> {
    const reply = this.#reply
    const isNone = payload === undefined && reply.statusCode !== 204
    if (isNone || payload === reply || reply.sent || this.#payload !== null || isStream(payload)) return
    if (this.route.commitOn !== 'onSend' || this.unit.ended) return
    if (isWebResponse(payload)) reply.code(payload.status)
    if (!this.#commits()) return
    try {
      await this.unit.settle('commit', AFTER_HANDLER)
    } catch (error) {
      for (const name of HEADERS_OF_SUCCESS) reply.removeHeader(name)
      throw error
    }
    ;[this.unit, this.session] = this.#make()
  }

  // For the unit of work

  get log(): FastifyBaseLogger {
    return this.#request.log
  }

  get maxSessionMillis(): number | false {
    return this.#options.maxSessionMillis
  }

  settings(): Step | undefined {
    const own = routeSettings(this.route, this.#isReadOnly)
    const { settings } = this.#options
    return settings === undefined && own === undefined
      ? undefined
      : settingsStep({ ...own, ...(settings && ownSettings(settings(this.#request))) })
  }

  onFirstUse(): void {
    this.#watch()
  }

  onCut(): void {
    this.#cutStream()
  }

  get #payload(): unknown {
    return (this.#request as unknown as Slotted)[this.#slots.payload]
  }

  /** onSend: settles, unless this is not the time, and then calls `leave`; never for an answer that must not leave. */
  send(payload: unknown, leave: Leave): void {
    if (this.#isTimedOut && this.#isUsed && this.#reply.statusCode < 400) this.#refuse(this.#timeoutError(), leave)
    // The answer to an error does not wait: ROLLBACK needs no answer to be certain.
    else if (this.#isFailed || this.#hasLeft || this.#payload === 'stream') this.#leave(leave)
    else this.#answerAfter(this.#settleFor(payload), leave)
  }

  #settleFor(payload: unknown): Promise<void> | undefined {
    if (this.route.commitOn !== 'onSend') return this.#leaveUncommitted()
    if (isWebResponse(payload)) this.#reply.code(payload.status)
    return isSendable(payload, this.#reply) ? this.#settle() : this.#rollBack()
  }

  #leave(leave: Leave, error?: Error): void {
    const timing = this.holdings && serverTiming(this.holdings)
    if (timing && !this.#reply.raw.headersSent) this.#tellTiming(timing)
    leave(error)
  }

  // Behind what the app says there, and once, also where an error follows the answer through this hook.
  #tellTiming(timing: string): void {
    const told = String(this.#reply.getHeader('server-timing') ?? '').replace(this.#timing ?? '', '')
    this.#timing = told === '' ? timing : `, ${timing}`
    this.#reply.header('server-timing', told + this.#timing)
  }

  #refuse(error: Error, leave: Leave): void {
    for (const name of HEADERS_OF_SUCCESS) this.#reply.removeHeader(name)
    this.#leave(leave, error)
  }

  // Before an answer that does not wait for COMMIT.
  #leaveUncommitted(): Promise<void> | undefined {
    if (this.#reply.statusCode >= 400) return undefined
    // It was ended from outside, or its connection or a statement has failed: the client can still be told.
    if (this.unit.ended || this.unit.isFailed) return this.#settle()
    // Else clients would be let in faster than the pool can write.
    this.#flushed ??= this.unit.sendKept()
    return this.#flushed
  }

  /** onError: rolls back, whatever was thrown. */
  fail(error: unknown): void {
    // The answer is out, whatever fails now, such as a second one: onResponse will end the session by what was said.
    if (this.#reply.raw.writableEnded) {
      this.#saidStatus ??= this.#reply.statusCode
      return
    }
    if (this.#isAnswering && this.unit.outcome === 'commit') {
      // An answer waits for its COMMIT, which stands: a 500 in its place would be wrong about the rows.
      this.#interrupted ??= this.#reply.getHeaders()
      this.#request.log.error({ err: error }, 'request-db: an error came after the answer, whose COMMIT is under way')
      return
    }
    this.#isFailed = true
    this.#isTimedOut ||= (error as { code?: unknown } | null)?.code === 'FST_ERR_HANDLER_TIMEOUT'
    void this.#rollBack()
  }

  #timeoutError(): Error {
    return new SessionEnded(this.name, 'the handler timed out and was rolled back, so its answer is not sent')
  }

  #rollBack(): Promise<void> | undefined {
    // Where the settlement itself failed, that is the very error being handled.
    return this.unit.settle('rollback', AFTER_ERROR)?.catch(() => {})
  }

  /**
   * Lets one answer leave after the settlement. Fastify can have two under way, since an async handler that calls
   * `reply.send(x)` without returning it makes a second, empty one while we wait; and an answer can be overtaken by an
   * error, such as a handler timeout. The one too many never leaves: its hook does not call back.
   */
  #answerAfter(settlement: Promise<void> | undefined, leave: Leave): void {
    if (settlement === undefined) {
      this.#leave(leave)
      return
    }
    const isSecond = this.#isAnswering
    this.#isAnswering = true
    const { statusCode } = this.#reply
    const isLeaving = () => {
      if (isSecond || this.#isFailed) return false
      this.#isAnswering = false
      this.#hasLeft = true
      return true
    }
    settlement.then(
      () => {
        if (!isLeaving()) return
        if (this.#interrupted) this.#restore(statusCode, this.#interrupted)
        try {
          this.#leave(leave)
        } catch (error) {
          // Fastify could not write it after all, and takes the error in its place.
          leave(error as Error)
        }
      },
      (error) => {
        if (!isLeaving()) return
        if (this.#interrupted) this.#reply.code(error.statusCode ?? 500)
        this.#refuse(error, leave)
      },
    )
  }

  /** The error handler has made the answer its own meanwhile. */
  #restore(statusCode: number, headers: Headers): void {
    const reply = this.#reply
    for (const name of Object.keys(reply.getHeaders())) if (!(name in headers)) reply.removeHeader(name)
    reply.code(statusCode).headers(headers)
  }

  /** onResponse: ends what is left. Nobody can be told of a failure any more, so it is logged. */
  respond(): Promise<void> | undefined {
    this.#isAnswered = this.#reply.raw.writableEnded
    if (this.#saidStatus !== undefined) this.#reply.raw.statusCode = this.#saidStatus
    if (this.unit.ended) return this.unit.settle('rollback', AFTER_ANSWER)?.catch(() => {})
    // HTTP/2 and aborted injections come here too when the client has left before the answer.
    if (!this.#reply.raw.writableEnded) return this.unit.settle('rollback', CLIENT_GONE)?.catch(() => {})
    const isHijacked = this.#payload === null
    if (isHijacked && this.unit.state !== 'idle') {
      this.#request.log.warn('request-db: a hijacked reply ended without request.db.commit(), so it was rolled back')
    }
    const settlement = isHijacked ? this.unit.settle('rollback', AFTER_ANSWER) : this.#settle()
    return settlement?.catch((error: unknown) => {
      this.#request.log.error({ err: error }, 'request-db: the transaction failed after the response was sent')
    })
  }

  /** The response, or the socket under it, is closed. */
  gone(): void {
    this.#unwatch()
    // `close` follows every answer. It can come before our onResponse, behind a slow hook of the app; and a 404 of a
    // plugin in a child scope has none. HTTP/2 says `finish` of a reset too, and injections never set writableFinished.
    const isAnswered = this.#isFinished && this.#reply.raw.writableEnded && this.#payload !== null
    if (!this.unit.ended && isAnswered) void this.respond()
    if (!this.#isAnswered) void this.unit.abandon(CLIENT_GONE)
  }

  #settle(): Promise<void> | undefined {
    if (this.unit.ended) return this.unit.settle('commit', AFTER_ANSWER)
    const { raw } = this.#reply
    if (isGone(this.#request, this.#reply) && !raw.writableEnded) return this.unit.settle('rollback', CLIENT_GONE)
    let commits: boolean
    try {
      commits = this.#commits()
    } catch (error) {
      return (this.unit.settle('rollback', AFTER_ERROR) ?? Promise.resolve()).then(() => Promise.reject(error))
    }
    return this.unit.settle(commits ? 'commit' : 'rollback', AFTER_ANSWER)
  }

  #commits(): boolean {
    const commits = (this.route.shouldCommit ?? isSuccess)(this.#request, this.#reply)
    // A promise would be true, whatever it comes to.
    if (isThenable(commits)) {
      throw new InvalidOption('shouldCommit', 'a function that returns true or false', 'a promise')
    }
    return commits
  }

  // Fastify calls no hook for many ways in which a client can leave, so we listen where it shows.
  #watch(): void {
    const { raw } = this.#reply
    const { socket } = this.#request.raw
    if (raw.writableEnded) throw new SessionEnded(this.name, AFTER_ANSWER)
    if (isGone(this.#request, this.#reply)) throw new SessionEnded(this.name, CLIENT_GONE)
    if (this.#isUsed) return
    this.#isUsed = true
    raw.on('finish', this.#onFinish)
    raw.on('close', this.#onClose)
    raw.on('error', this.#onClose)
    this.#watched = watchSocket(socket, this)
  }

  readonly #onClose = () => this.gone()
  readonly #onFinish = () => {
    this.#isFinished = true
  }

  #unwatch(): void {
    this.#watched?.delete(this)
    this.#reply.raw.off('finish', this.#onFinish)
    this.#reply.raw.off('close', this.#onClose)
    this.#reply.raw.off('error', this.#onClose)
  }

  #cutStream(): void {
    const { raw } = this.#reply
    if (raw.headersSent && !raw.writableEnded) raw.destroy()
  }
}

function isGone(request: FastifyRequest, reply: FastifyReply): boolean {
  // On HTTP/2 the response does not say that it is destroyed, but its stream does.
  const { stream, destroyed } = reply.raw as { stream?: { destroyed: boolean }; destroyed: boolean }
  return destroyed || stream?.destroyed === true || request.raw.aborted || request.raw.socket.destroyed
}

const isThenable = (value: unknown) => typeof (value as { then?: unknown } | null | undefined)?.then === 'function'
