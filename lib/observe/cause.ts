/** Why there was no connection, in the order in which they are looked for: the first that fits is the verdict. */
export type Cause =
  | 'unreachable'
  | 'server-full'
  | 'hold-and-wait'
  | 'leak'
  | 'lock-wait'
  | 'slow-sql'
  | 'held-idle'
  | 'pool-too-small'

/** What is wrong and what to change. */
export interface Verdict {
  /** The first of the causes that fits. */
  readonly cause: Cause
  /** For a person: what happened, and what to do about it. */
  readonly sentence: string
  /** The guilty ones, worst first, such as `GET /report`; empty where none is. */
  readonly routes: readonly string[]
  /** The figures it rests on. */
  readonly evidence: Readonly<Record<string, unknown>>
}
