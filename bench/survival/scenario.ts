import type { FastifyInstance } from 'fastify'
import type { Answer, Call } from './call.ts'
import type { Contender, Handler } from './contender.ts'
import type { Network } from './network.ts'
import type { Witness } from './witness.ts'

/** A scenario's side in the app's process. */
export interface Stage {
  readonly app: FastifyInstance
  readonly contender: Contender
  /** A POST whose handler runs in one transaction. */
  post(url: string, handler: Handler): void
  /** Tells that a moment has come. */
  come(moment: string): void
  /** Waits until the player says that a moment has come. */
  when(moment: string): Promise<void>
  /** Keeps something for after the answer. */
  keep(use: () => Promise<unknown>): void
}

/** A scenario's side outside of the app. */
export interface Player {
  call(method: 'GET' | 'POST', path: string): Call
  /** Lets a handler go on that waits for this moment. */
  come(moment: string): Promise<void>
  /** Waits until a handler is there. `/path is left` comes when its client has gone. */
  when(moment: string): Promise<void>
  /** What the app's log says at the level of warnings and above. */
  log(): Promise<readonly string[]>
  /** Uses what a handler has kept: whether that was possible. */
  later(): Promise<boolean | undefined>
  /** Tells the process to end; its exit code, or nothing if it does not. */
  terminate(): Promise<string | undefined>
  readonly network: Network
  readonly witness: Witness
}

/** One request, and what has to have become of it. */
export interface Deed {
  /** Who asked, if it is not the request that the scenario is about. */
  readonly who?: string
  readonly answer: Answer
  /** What right behaviour answers. `nobody`: the client has left. */
  readonly answered: 'ok' | 'error' | 'either' | 'nobody'
  /** The notes it wrote. */
  readonly notes: readonly string[]
  /** What the database must have of them. Default: all after an answer below 400, else none. */
  readonly kept?: 'all' | 'none' | 'either'
}

export interface Outcome {
  readonly deeds: readonly Deed[]
  /** What else was wrong, in a few words each. */
  readonly complaints?: readonly string[]
}

/** Something that can happen to a request, and is posed to all contenders alike. */
export interface Scenario {
  readonly name: string
  /** What is done, and what is right. */
  readonly what: string
  /** Connections of the pool, 1 if nothing is said: then one that is not given back is missed by the next request. */
  readonly size?: number
  /** The process has to end by itself. */
  readonly ends?: boolean
  serve(stage: Stage): void
  play(player: Player): Promise<Outcome>
}

export const WAIT_MILLIS = 1500
/** What has not been answered by then is called hanging. */
export const ANSWERED_WITHIN_MILLIS = 4000
