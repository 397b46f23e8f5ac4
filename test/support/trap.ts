import { gate } from './gate.ts'
import type { Cut, ProxiedConnection, Verdict } from './proxied-connection.ts'
import type { Recording } from './recorder.ts'
import { type Message, textOf } from './wire.ts'

/** A message to wait for. */
export interface Moment {
  readonly from: 'client' | 'server'
  /** The protocol's letter (client: P Parse, B Bind, S Sync, Q; server: C CommandComplete, Z, E), or `startup` or `cancel`. */
  readonly type: string
  /** Part of the statement (P, Q; any case), the tag (C), the SQLSTATE (E) or the status (Z). */
  readonly text?: string | RegExp
}

/**
 * `end` and `reset` take the connection down, `swallow` makes it half-open both ways, `hold` keeps back what this
 * side says until `release()`.
 */
export type Deed = Cut | 'swallow' | 'hold'

export interface Trap {
  /** Resolves with the connection on which it happened first. */
  readonly sprung: Promise<Recording>
  /** Lets go what `hold` kept back. */
  release(): void
}

/** A trap that is set, from the proxy's side. */
export class SetTrap implements Trap {
  readonly sprung: Promise<Recording>
  readonly #moment: Moment
  readonly #deed: Deed
  readonly #place: 'before' | 'after'
  readonly #spring: (recording: Recording) => void
  readonly #held: ProxiedConnection[] = []
  #left: number

  constructor(moment: Moment, deed: Deed, place: 'before' | 'after', times: number) {
    const { opened, open } = gate<Recording>()
    this.sprung = opened
    this.#spring = open
    this.#moment = moment
    this.#deed = deed
    this.#place = place
    this.#left = times
  }

  release(): void {
    for (const connection of this.#held.splice(0)) this.#lane(connection).release()
  }

  /** What becomes of a message; undefined where the trap is not for it. */
  verdict(connection: ProxiedConnection, from: 'client' | 'server', message: Message): Verdict | undefined {
    if (this.#left === 0 || !matches(this.#moment, from, message)) return undefined
    this.#left--
    return { place: this.#place, act: () => this.#act(connection) }
  }

  #act(connection: ProxiedConnection): void {
    if (this.#deed === 'swallow') connection.swallow('both')
    else if (this.#deed !== 'hold') connection.cut(this.#deed)
    else {
      this.#held.push(connection)
      this.#lane(connection).hold()
    }
    this.#spring(connection.recorder.recording)
  }

  #lane({ toServer, toClient }: ProxiedConnection) {
    return this.#moment.from === 'client' ? toServer : toClient
  }
}

function matches({ from, type, text }: Moment, side: 'client' | 'server', message: Message): boolean {
  if (from !== side || type !== message.type) return false
  if (text === undefined) return true
  const got = textOf(message, side)
  return typeof text === 'string' ? got.toLowerCase().includes(text.toLowerCase()) : text.test(got)
}
