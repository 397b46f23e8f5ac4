import type { HolderSnapshot, WaiterSnapshot } from '../observe/snapshot.ts'
import { cut, labelOf } from './labels.ts'

const MOST_GROUPS = 50

/** Those that hold a connection, or wait for one, by route. */
export interface Group {
  readonly name: string
  count: number
  oldestMillis: number
}
export interface HolderGroup extends Group {
  /** How many of them have a statement under way. */
  busy: number
  busyMillis: number
  idleMillis: number
  /** Of the oldest one. */
  lastStatement: string | undefined
}

export function groupWaiters(waiters: readonly WaiterSnapshot[]): Group[] {
  const groups = new Map<string, Group>()
  for (const waiter of waiters) {
    const name = labelOf(waiter, waiter.openedBy)
    const group = groups.get(name) ?? { name, count: 0, oldestMillis: 0 }
    groups.set(name, group)
    group.count++
    group.oldestMillis = Math.max(group.oldestMillis, Math.round(waiter.waitedMillis))
  }
  return largest(groups)
}

export function groupHolders(holders: readonly HolderSnapshot[]): HolderGroup[] {
  const groups = new Map<string, HolderGroup>()
  for (const holder of holders) {
    const name = labelOf(holder, holder.openedBy)
    const none = { count: 0, oldestMillis: -1, busy: 0, busyMillis: 0, idleMillis: 0, lastStatement: undefined }
    const group: HolderGroup = groups.get(name) ?? { name, ...none }
    groups.set(name, group)
    group.count++
    if (holder.state === 'busy') group.busy++
    group.busyMillis += Math.round(holder.busyMillis)
    group.idleMillis += Math.round(holder.idleMillis)
    if (holder.heldMillis <= group.oldestMillis) continue
    group.oldestMillis = Math.round(holder.heldMillis)
    group.lastStatement = holder.lastStatement && cut(holder.lastStatement, 200)
  }
  return largest(groups)
}

const largest = <G extends Group>(groups: Map<string, G>): G[] =>
  [...groups.values()].sort((one, other) => other.count - one.count).slice(0, MOST_GROUPS)
