/** Somebody who wants a slot. Exactly one of the two is called, once, unless the waiter left before. */
export interface Waiter<T> {
  /** A slot is yours, and with it what its last owner left there, if anything. */
  granted(left: T | undefined): void
  /** There will be no slot for you. `waitedMillis` is how long you stood here. */
  refused(why: 'timeout' | 'saturated' | 'closed', waitedMillis: number): void
}

interface Place<T> {
  readonly waiter: Waiter<T>
  readonly since: number
}

/** Monotonic milliseconds: a clock that no administrator sets back. */
export const now = (): number => performance.now()

/**
 * Grants a fixed number of slots, strictly in the order of asking: who comes while somebody waits, waits behind.
 * SQLAlchemy: the counting part of QueuePool. It knows nothing of databases.
 */
export class Queue<T> {
  readonly #capacity: number
  readonly #timeoutMillis: number
  readonly #maxWaiting: number
  // Insertion order is the order of the queue, and a waiter who leaves from the middle costs nothing.
  readonly #places = new Set<Place<T>>()
  readonly #placeOf = new Map<Waiter<T>, Place<T>>()
  #taken = 0
  #timer: NodeJS.Timeout | undefined
  #isSpared: ((waiter: Waiter<T>) => boolean) | undefined

  constructor(options: { capacity: number; timeoutMillis: number; maxWaiting: number }) {
    this.#capacity = options.capacity
    this.#timeoutMillis = options.timeoutMillis
    this.#maxWaiting = options.maxWaiting
  }

  get waiting(): number {
    return this.#places.size
  }

  /** Slots that are taken now. */
  get taken(): number {
    return this.#taken
  }

  /** Takes a slot, now or later, or is refused. */
  enter(waiter: Waiter<T>): void {
    if (this.#places.size === 0 && this.#taken < this.#capacity) {
      this.#taken++
      waiter.granted(undefined)
    } else if (this.#isSpared?.(waiter) === false) waiter.refused('closed', 0)
    else if (this.#timeoutMillis === 0) waiter.refused('timeout', 0)
    else if (this.#places.size >= this.#maxWaiting) waiter.refused('saturated', 0)
    else {
      const place = { waiter, since: now() }
      this.#places.add(place)
      this.#placeOf.set(waiter, place)
      this.#watchHead()
    }
  }

  /** Stops waiting. False when the waiter does not wait (any more). */
  cancel(waiter: Waiter<T>): boolean {
    const place = this.#placeOf.get(waiter)
    if (place === undefined) return false
    this.#remove(place)
    return true
  }

  /** Passes the slot, and what is left in it, to the longest waiter. False, and the slot still taken, when nobody waits. */
  pass(left: T): boolean {
    const place = this.#head()
    if (place === undefined) return false
    this.#remove(place)
    place.waiter.granted(left)
    return true
  }

  /** Gives the slot back, empty. */
  leave(): void {
    const place = this.#head()
    if (place === undefined) {
      this.#taken--
      return
    }
    this.#remove(place)
    place.waiter.granted(undefined)
  }

  /** Refuses everybody who waits, and from now on everybody who would have to, but for those `isSpared` spares. */
  close(isSpared: (waiter: Waiter<T>) => boolean = () => false): void {
    this.#isSpared = isSpared
    for (const place of [...this.#places]) if (!isSpared(place.waiter)) this.#refuse(place, 'closed')
  }

  #head(): Place<T> | undefined {
    return this.#places.values().next().value
  }

  #remove(place: Place<T>): void {
    this.#places.delete(place)
    this.#placeOf.delete(place.waiter)
    if (this.#places.size === 0 && this.#timer !== undefined) {
      clearTimeout(this.#timer)
      this.#timer = undefined
    }
  }

  #refuse(place: Place<T>, why: 'timeout' | 'closed'): void {
    this.#remove(place)
    place.waiter.refused(why, now() - place.since)
  }

  // All wait equally long, so the head's is the only deadline there is to watch.
  #watchHead(): void {
    if (this.#timer !== undefined) return
    const head = this.#head()
    if (head === undefined) return
    this.#timer = setTimeout(
      // One turn of the event loop before the verdict: a connection may have come back while the app computed.
      () => setImmediate(() => this.#expire()),
      Math.ceil(head.since + this.#timeoutMillis - now()),
    )
  }

  #expire(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const due = now() - this.#timeoutMillis
    for (const place of [...this.#places]) {
      if (place.since > due) break
      // A refusal may have moved others along.
      if (this.#places.has(place)) this.#refuse(place, 'timeout')
    }
    this.#watchHead()
  }
}
