import { type Channel, channel } from 'node:diagnostics_channel'
import type { FastifyBaseLogger } from 'fastify'
import type { Report } from './report.ts'
import type { ObservedPool, Who } from './snapshot.ts'

// What happens, for whoever listens on `node:diagnostics_channel`. Without a subscriber nothing is made for it.
// Durations are milliseconds. A message belongs to its publisher: look at it, and keep what you need of it.

interface PoolEvent {
  /** The same object as `fastify.db.pool`. */
  readonly pool: ObservedPool
  /** Of the request, where there is one; else the instance's. */
  readonly log: FastifyBaseLogger
}
interface ConnectionEvent extends PoolEvent {
  /** Process id of the PostgreSQL backend. */
  readonly pid: number
}
interface SessionEvent extends ConnectionEvent {
  /** Whose session it is. */
  readonly who: Who
}

/** A connection was opened, or could not be. SQLAlchemy: `connect`. */
export interface ConnectEvent extends PoolEvent {
  /** Undefined where it failed. */
  readonly pid: number | undefined
  /** How long that took. */
  readonly millis: number
  /** Undefined where it succeeded. */
  readonly error: Error | undefined
}
/** A session stopped waiting for a connection, with or without one. */
export interface WaitEvent extends PoolEvent {
  /** Whose session it is. */
  readonly who: Who
  /** Since it asked. */
  readonly waitedMillis: number
  /** `left`: it did not want one any more; `failed`: none could be opened. */
  readonly outcome: 'granted' | 'timeout' | 'saturated' | 'closed' | 'failed' | 'left'
}
/** A session has got a connection. SQLAlchemy: `checkout`. */
export interface CheckoutEvent extends SessionEvent {
  /** Since it asked. */
  readonly waitedMillis: number
  /** The session before still waits for the answer to its COMMIT or ROLLBACK. */
  readonly isHandedOver: boolean
}
/** A session's connection is the pool's again, or another session's, or dead. SQLAlchemy: `checkin`. */
export interface CheckinEvent extends SessionEvent {
  /** Since its check-out. */
  readonly heldMillis: number
  /** Of `heldMillis`, waiting for the server. */
  readonly busyMillis: number
  /** How many it has sent. */
  readonly statements: number
  /** It went to the next session before the answer to COMMIT or ROLLBACK. */
  readonly isHandedOver: boolean
}
/** A session ended without commit, so ROLLBACK was sent for it. SQLAlchemy: `reset`. */
export interface ResetEvent extends SessionEvent {}
/** A connection was dropped because it was dead, dirty or suspect. SQLAlchemy: `invalidate`. */
export interface InvalidateEvent extends ConnectionEvent {
  /** What was wrong with it, where that is known. */
  readonly error: Error | undefined
}
/** A connection was closed in good order. SQLAlchemy: `close`. */
export interface CloseEvent extends ConnectionEvent {
  /** It was one too many, too old, or the server shuts down. */
  readonly why: 'overflow' | 'recycled' | 'shutdown'
}
/** BEGIN was sent. */
export interface BeginEvent extends SessionEvent {
  /** Such as `BEGIN READ ONLY`. */
  readonly text: string
  /** With the first statement, rather than by `begin()`. */
  readonly isImplicit: boolean
}
/** COMMIT was answered, or its connection died. */
export interface CommitEvent extends SessionEvent {
  /** From its leaving to its answer. */
  readonly millis: number
  /** Undefined where it succeeded. */
  readonly error: Error | undefined
}
/** ROLLBACK was answered, or its connection died. */
export interface RollbackEvent extends SessionEvent {
  /** From its leaving to its answer. */
  readonly millis: number
  /** Undefined where it succeeded. */
  readonly error: Error | undefined
}
/**
 * A statement of the app. The same object goes to `statementStart` when the app asks for it, and to `statement` when it
 * is through: then with its outcome.
 */
export interface StatementEvent extends PoolEvent {
  /** Whose session it is. */
  readonly who: Who
  /** SQL without parameters. */
  readonly text: string
  /** As they go over the wire. They are the app's secrets. */
  readonly parameters: readonly unknown[]
  /** Undefined where it never got to a connection. */
  pid: number | undefined
  /** From its leaving, or the end of the statement before it, to its answer. */
  millis: number
  /** Rows returned or changed, as PostgreSQL counts them. */
  rowCount: number | undefined
  /** The app's secrets, too. */
  rows: readonly unknown[] | undefined
  /** Undefined where it succeeded. */
  error: Error | undefined
}
/** A holder is suspected of a leak (`leakDetectionMillis`), or has come back after all. */
export interface LeakEvent extends SessionEvent {
  /** Since its check-out. */
  readonly heldMillis: number
  /** False when it is suspected, true when it has come back. */
  readonly isBack: boolean
  /** Where the app asked for the connection, as a stack. */
  readonly callSite: string
}
/** A session was refused, or a request that holds a connection waits for a second one. */
export interface ReportEvent extends PoolEvent {
  /** As in `error.report`. */
  readonly report: Report
}

// The channels are kept here for the life of the process: else they, and who subscribed, could be collected.
const named = <T>(name: string) => channel(`fastify-request-db:${name}`) as Channel<unknown, T>

export const connect = named<ConnectEvent>('connect')
export const wait = named<WaitEvent>('wait')
export const checkout = named<CheckoutEvent>('checkout')
export const checkin = named<CheckinEvent>('checkin')
export const reset = named<ResetEvent>('reset')
export const invalidate = named<InvalidateEvent>('invalidate')
export const close = named<CloseEvent>('close')
export const begin = named<BeginEvent>('begin')
export const statementStart = named<StatementEvent>('statement-start')
export const statement = named<StatementEvent>('statement')
export const commit = named<CommitEvent>('commit')
export const rollback = named<RollbackEvent>('rollback')
export const leak = named<LeakEvent>('leak')
export const report = named<ReportEvent>('report')

/** Each event, by the name of its channel without `fastify-request-db:`. */
export interface Events {
  /** A connection was opened, or could not be. */
  connect: ConnectEvent
  /** A session stopped waiting. */
  wait: WaitEvent
  /** A session has got a connection. */
  checkout: CheckoutEvent
  /** A session has given its connection back or handed it over. */
  checkin: CheckinEvent
  /** A session ended without commit. */
  reset: ResetEvent
  /** A connection was dropped. */
  invalidate: InvalidateEvent
  /** A connection was closed in good order. */
  close: CloseEvent
  /** BEGIN was sent. */
  begin: BeginEvent
  /** The app asked for a statement. */
  'statement-start': StatementEvent
  /** A statement is through. */
  statement: StatementEvent
  /** COMMIT was answered. */
  commit: CommitEvent
  /** ROLLBACK was answered. */
  rollback: RollbackEvent
  /** A holder is suspected of a leak. */
  leak: LeakEvent
  /** A session was refused, or will be. */
  report: ReportEvent
}

/** A function for each event that is of interest. */
export type Listeners = { [Name in keyof Events]?: (event: Events[Name]) => void }

/** Subscribes to the events of one pool. Returns how to stop it. */
export function listen(pool: ObservedPool, listeners: Listeners): () => void {
  const subscribed = Object.entries(listeners).map(([name, listener]) => {
    const subscriber = (event: unknown) => {
      if ((event as PoolEvent).pool === pool) (listener as (event: unknown) => void)(event)
    }
    const target = channel(`fastify-request-db:${name}`)
    target.subscribe(subscriber)
    return () => void target.unsubscribe(subscriber)
  })
  return () => {
    for (const unsubscribe of subscribed) unsubscribe()
  }
}
