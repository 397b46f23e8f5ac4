import type { CheckinEvent, CheckoutEvent } from '../observe/channels.ts'
import type { HolderSnapshot, Snapshot } from '../observe/snapshot.ts'
import { cut, labelOf } from './labels.ts'

/** The time line's resolution in milliseconds. */
export const CELL_MILLIS = 100
// What is drawn at most, and so what is kept at most for a page that is late.
const MOST_CELLS = 600

/** A connection since the last update. */
export interface LaneUpdate {
  /** Its place on the page: another connection may get it when this one is closed. */
  readonly slot: number
  readonly pid: number
  readonly state: 'busy' | 'idle' | 'free'
  readonly stateMillis: number
  readonly heldMillis: number
  readonly route: string | undefined
  readonly statement: string | undefined
  /** Percent of each cell. The rest of it the connection was free. */
  readonly busy: readonly number[]
  readonly idle: readonly number[]
  /** Who held it longest in each cell: a place in `names`; -1 nobody. */
  readonly who: readonly number[]
}

interface Lane {
  readonly slot: number
  readonly pid: number
  holder: HolderSnapshot | undefined
  freeSince: number
  /** Of the present holder, what is in cells already. */
  countedHeld: number
  countedBusy: number
  /** Of the cell under way. */
  held: number
  busy: number
  longest: number
  route: string | undefined
  cells: { busy: number[]; idle: number[]; who: (string | undefined)[] }
}

const noCells = (): Lane['cells'] => ({ busy: [], idle: [], who: [] })

/** What each connection does: held times come exactly from the ledger, and are spread over cells of `CELL_MILLIS`. */
export class Lanes {
  readonly #lanes = new Map<number, Lane>()
  #cell: number
  #sampledAt: number

  constructor(at: number) {
    this.#cell = Math.floor(at / CELL_MILLIS)
    this.#sampledAt = at
  }

  get size(): number {
    return this.#lanes.size
  }

  checkedOut({ pid }: CheckoutEvent, at: number): void {
    const lane = this.#lane(pid, at)
    lane.countedHeld = 0
    lane.countedBusy = 0
  }

  checkedIn({ pid, who, heldMillis, busyMillis }: CheckinEvent, at: number): void {
    const lane = this.#lane(pid, at)
    count(lane, labelOf(who), heldMillis, busyMillis)
    lane.countedHeld = 0
    lane.countedBusy = 0
    lane.holder = undefined
    lane.freeSince = at
  }

  closed(pid: number | undefined): void {
    this.#lanes.delete(pid ?? -1)
  }

  /** Ends the cell under way. Returns how many cells of the time line have passed. */
  sample(snapshot: Snapshot, at: number): number {
    const passed = Math.min(MOST_CELLS, Math.floor(at / CELL_MILLIS) - this.#cell)
    if (passed <= 0) return 0
    this.#hold(snapshot.holders, at)
    this.#forget(snapshot.open)
    const millis = at - this.#sampledAt
    for (const lane of this.#lanes.values()) fill(lane, millis, passed)
    this.#cell = Math.floor(at / CELL_MILLIS)
    this.#sampledAt = at
    return passed
  }

  /** What there is since the last call. */
  take(at: number): { cell: number; lanes: LaneUpdate[]; names: string[] } {
    const names = new Map<string, number>()
    const lanes = Array.from(this.#lanes.values(), (lane) => {
      const { busy, idle, who } = lane.cells
      lane.cells = noCells()
      const { slot, pid, holder } = lane
      const { heldMillis = 0, lastStatement } = holder ?? {}
      return {
        slot,
        pid,
        state: holder?.state ?? ('free' as const),
        stateMillis: Math.round(holder?.stateMillis ?? at - lane.freeSince),
        heldMillis: Math.round(heldMillis),
        route: holder && labelOf(holder, holder.openedBy),
        statement: lastStatement && cut(lastStatement, 200),
        busy,
        idle,
        who: who.map((name) => (name === undefined ? -1 : indexOf(name, names))),
      }
    })
    return { cell: this.#cell, lanes, names: [...names.keys()] }
  }

  #hold(holders: readonly HolderSnapshot[], at: number): void {
    const held = new Set<number>()
    for (const holder of holders) {
      const isNew = !this.#lanes.has(holder.pid)
      const lane = this.#lane(holder.pid, at)
      // Of what was before the first look, only this cell's part is counted.
      if (isNew) skip(lane, holder, at - this.#sampledAt)
      count(lane, labelOf(holder, holder.openedBy), holder.heldMillis, holder.busyMillis)
      lane.holder = holder
      held.add(holder.pid)
    }
    for (const lane of this.#lanes.values()) {
      if (lane.holder === undefined || held.has(lane.pid)) continue
      lane.holder = undefined
      lane.freeSince = at
    }
  }

  /** Should one have gone without a word. */
  #forget(open: number): void {
    for (const lane of this.#lanes.values()) {
      if (this.#lanes.size <= open) return
      if (lane.holder === undefined) this.#lanes.delete(lane.pid)
    }
  }

  #lane(pid: number, at: number): Lane {
    const known = this.#lanes.get(pid)
    if (known !== undefined) return known
    const taken = new Set(Array.from(this.#lanes.values(), ({ slot }) => slot))
    let slot = 0
    while (taken.has(slot)) slot++
    const empty = { countedHeld: 0, countedBusy: 0, held: 0, busy: 0, longest: 0, route: undefined, cells: noCells() }
    const lane: Lane = { slot, pid, holder: undefined, freeSince: at, ...empty }
    this.#lanes.set(pid, lane)
    return lane
  }
}

function indexOf(name: string, names: Map<string, number>): number {
  const index = names.get(name) ?? names.size
  names.set(name, index)
  return index
}

function skip(lane: Lane, { heldMillis, busyMillis, state }: HolderSnapshot, millis: number): void {
  lane.countedHeld = Math.max(0, heldMillis - millis)
  lane.countedBusy = state === 'busy' ? Math.max(0, busyMillis - millis) : busyMillis
}

/** Adds to the cell what this holder did since the last cell. */
function count(lane: Lane, route: string, heldMillis: number, busyMillis: number): void {
  const held = Math.max(0, heldMillis - lane.countedHeld)
  lane.held += held
  lane.busy += Math.min(held, Math.max(0, busyMillis - lane.countedBusy))
  lane.countedHeld = heldMillis
  lane.countedBusy = busyMillis
  if (held < lane.longest) return
  lane.longest = held
  lane.route = route
}

function fill(lane: Lane, millis: number, passed: number): void {
  const busy = Math.min(100, Math.round((lane.busy / millis) * 100))
  const idle = Math.min(100 - busy, Math.max(0, Math.round(((lane.held - lane.busy) / millis) * 100)))
  const { cells } = lane
  for (let cell = 0; cell < passed && cells.busy.length < MOST_CELLS; cell++) {
    cells.busy.push(busy)
    cells.idle.push(idle)
    cells.who.push(lane.held > 0 ? lane.route : undefined)
  }
  lane.held = 0
  lane.busy = 0
  lane.longest = 0
  lane.route = undefined
}
