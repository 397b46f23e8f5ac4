import type { Socket } from 'node:net'

/** One direction of a connection through the proxy: what enters comes out at the other end, late, or never. */
export class Lane {
  /** How long each piece is under way. A change concerns what enters from now on; nothing overtakes. */
  delayMillis = 0
  /** Drops everything, the end of the stream too: the other side of a half-open connection hears nothing. */
  swallows = false
  readonly #target: Socket
  readonly #queue: { readonly due: number; readonly piece: Buffer | 'end' }[] = []
  #held = false
  #timer: NodeJS.Timeout | undefined

  constructor(target: Socket) {
    this.#target = target
  }

  enter(piece: Buffer | 'end'): void {
    if (this.swallows || piece.length === 0) return
    const due = Math.max(this.#queue.at(-1)?.due ?? 0, performance.now() + this.delayMillis)
    this.#queue.push({ due, piece })
    this.#deliver()
  }

  /** Keeps everything that enters from now on until `release()`. */
  hold(): void {
    this.#held = true
  }

  release(): void {
    this.#held = false
    this.#deliver()
  }

  /** Forgets what is under way. */
  close(): void {
    clearTimeout(this.#timer)
    this.#queue.length = 0
    this.swallows = true
  }

  #deliver(): void {
    clearTimeout(this.#timer)
    while (!this.#held && this.#queue[0]) {
      const wait = this.#queue[0].due - performance.now()
      if (wait > 0) {
        this.#timer = setTimeout(() => this.#deliver(), wait)
        return
      }
      const piece = this.#queue.shift()?.piece
      if (this.#target.destroyed) continue
      if (piece === 'end') this.#target.end()
      else if (piece) this.#target.write(piece)
    }
  }
}
