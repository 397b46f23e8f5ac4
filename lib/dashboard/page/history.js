/** What was in the last minute: a ring of cells, each a tenth of a second, in memory that does not grow. */

const KEPT = 1024
const MOST_NAMES = 2000

export class Ring {
  #stamps = new Float64Array(KEPT).fill(-1)
  #busy = new Uint8Array(KEPT)
  #idle = new Uint8Array(KEPT)
  #who = new Int16Array(KEPT)

  put(cell, busy, idle, who) {
    const at = cell % KEPT
    this.#stamps[at] = cell
    this.#busy[at] = busy
    this.#idle[at] = idle
    this.#who[at] = who
  }

  isKnown(cell) {
    return cell >= 0 && this.#stamps[cell % KEPT] === cell
  }

  /** One number for what the cell looks like; -1 where it is not known. */
  look(cell) {
    const at = cell % KEPT
    return this.isKnown(cell) ? this.#busy[at] * 101 + this.#idle[at] : -1
  }

  read(cell) {
    const at = cell % KEPT
    return { busy: this.#busy[at], idle: this.#idle[at], who: this.#who[at] }
  }
}

/** How many waited. */
export class Counts {
  #stamps = new Float64Array(KEPT).fill(-1)
  #counts = new Float64Array(KEPT)

  put(cell, count) {
    this.#stamps[cell % KEPT] = cell
    this.#counts[cell % KEPT] = count
  }

  read(cell) {
    return cell >= 0 && this.#stamps[cell % KEPT] === cell ? this.#counts[cell % KEPT] : 0
  }
}

export class History {
  cellMillis = 100
  lanes = []
  queue = new Counts()
  #names = []
  #places = new Map()
  #lastAt = -1

  nameOf(who) {
    return this.#names[who] ?? ''
  }

  /** Returns whether it had to begin anew. */
  add(update) {
    const isNew = this.#lastAt === -1 || update.at < this.#lastAt || update.at - this.#lastAt > 60_000
    if (isNew) this.#reset()
    this.#lastAt = update.at
    this.cellMillis = update.cellMillis
    const places = update.names.map((name) => this.#place(name))
    const { cell, queue } = update
    for (const [index, count] of queue.entries()) this.queue.put(cell - queue.length + index, count)
    for (const lane of update.lanes) this.#addLane(lane, cell, places, isNew)
    return isNew
  }

  ring(slot) {
    this.lanes[slot] ??= new Ring()
    return this.lanes[slot]
  }

  #addLane(lane, cell, places, isNew) {
    const ring = this.ring(lane.slot)
    const { busy, idle, who } = lane
    const from = cell - busy.length
    if (isNew && lane.route !== undefined) this.#recall(ring, lane, from)
    for (const [index, share] of busy.entries()) {
      ring.put(from + index, share, idle[index], who[index] === -1 ? -1 : places[who[index]])
    }
  }

  /** Of before the page was opened, this much is known: it has been in this state for so long. */
  #recall(ring, { state, stateMillis, route }, from) {
    const cells = Math.min(600, Math.floor(stateMillis / this.cellMillis))
    const who = this.#place(route)
    for (let back = 1; back <= cells && from - back >= 0; back++) {
      ring.put(from - back, state === 'busy' ? 100 : 0, state === 'idle' ? 100 : 0, who)
    }
  }

  #place(name) {
    let place = this.#places.get(name)
    if (place === undefined) {
      place = this.#names.length < MOST_NAMES ? this.#names.push(name) - 1 : -1
      if (place !== -1) this.#places.set(name, place)
    }
    return place
  }

  #reset() {
    this.lanes = []
    this.queue = new Counts()
  }
}

/** Totals of the last minute, for rates. */
export class Totals {
  #kept = []

  add(at, totals) {
    const last = this.#kept.at(-1)
    if (last !== undefined && at < last.at) this.#kept = []
    this.#kept.push({ at, totals })
    while (this.#kept.length > 1200 || this.#kept[0].at < at - 61_000) this.#kept.shift()
  }

  /** What was added within so many milliseconds: to any of `names`. */
  within(millis, ...names) {
    const last = this.#kept.at(-1)
    const first = this.#kept.find(({ at }) => at >= last.at - millis - 50)
    return names.reduce((sum, name) => sum + last.totals[name] - first.totals[name], 0)
  }

  perSecond(millis, name) {
    const last = this.#kept.at(-1)
    const first = this.#kept.find(({ at }) => at >= last.at - millis - 50)
    return first === last ? 0 : ((last.totals[name] - first.totals[name]) / (last.at - first.at)) * 1000
  }
}
