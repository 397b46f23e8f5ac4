/** Somebody who wants a slot. Exactly one of the two is called, once, unless the waiter left before. */
export interface Waiter<T> {
  /** A slot is yours, and with it what its last owner left there, if anything. */
  granted(left: T | undefined): void
  /**
   * There will be no slot for you. `waitedMillis` is how long you stood here. Called after `granted` only for who was
   * handed a slot before its last owner was done, and has waited too long for that.
   */
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
  // Who has a slot whose last owner is not done with it: they wait still. In the order of asking, as all get theirs so.
  readonly #followers = new Map<Waiter<T>, Place<T>>()
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

  /** Who has waited longest for a slot. */
  get head(): Waiter<T> | undefined {
    return this.#head()?.waiter
  }

  /** A newcomer would have to wait, with nobody before it. */
  get isFull(): boolean {
    return this.#places.size === 0 && this.#taken >= this.#capacity
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

  /**
   * Passes the slot to `waiter`, the longest waiter or, where nobody waits, a newcomer, before its owner is done with it.
   * The time until `caughtUp` is waiting time.
   */
  handOver(waiter: Waiter<T>, left: T): void {
    const place = this.#placeOf.get(waiter) ?? { waiter, since: now() }
    this.#followers.set(waiter, place)
    this.#remove(place)
    this.#watchHead()
    waiter.granted(left)
  }

  /** The owner before `waiter` is done, or `waiter` is. */
  caughtUp(waiter: Waiter<T>): void {
    this.#followers.delete(waiter)
    this.#unwatch()
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
    this.#unwatch()
  }

  #unwatch(): void {
    if (this.#places.size + this.#followers.size > 0 || this.#timer === undefined) return
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  #refuse(place: Place<T>, why: 'timeout' | 'closed'): void {
    this.#remove(place)
    place.waiter.refused(why, now() - place.since)
  }

  // All wait equally long, so the head's is the only deadline there is to watch.
  #watchHead(): void {
    if (this.#timer !== undefined) return
    const head: Place<T> | undefined = this.#followers.values().next().value ?? this.#head()
    if (head === undefined) return
    this.#timer = setTimeout(
      // One turn of the event loop before the verdict: a connection may have come back while the app computed.
      () => setImmediate(() => this.#expire()),
      // It may be late already. Node warns of a time that is past.
      Math.max(0, Math.ceil(head.since + this.#timeoutMillis - now())),
    )
  }

  #expire(): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const due = now() - this.#timeoutMillis
    for (const [waiter, { since }] of [...this.#followers]) {
      if (since > due) break
      if (this.#followers.delete(waiter)) waiter.refused('timeout', now() - since)
    }
    for (const place of [...this.#places]) {
      if (place.since > due) break
      // A refusal may have moved others along.
      if (this.#places.has(place)) this.#refuse(place, 'timeout')
    }
    this.#watchHead()
  }
}
