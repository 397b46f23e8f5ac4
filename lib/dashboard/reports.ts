import type { Report } from '../observe/report.ts'
import { cut, labelOf } from './labels.ts'

const MOST_REPORTS = 10
const MOST_GROUPS = 12

/** A report as the page shows it: no evidence, which may hold the SQL of others, and no places in the app's code. */
export interface ShownReport {
  readonly id: number
  readonly at: string
  readonly code: string | undefined
  readonly cause: string | undefined
  readonly sentence: string | undefined
  readonly routes: readonly string[]
  /** How many reports in a row said the same. */
  readonly times: number
  readonly checkedOut: number
  readonly waiting: number
  readonly holders: readonly object[]
  readonly waiters: readonly object[]
}

/** The latest reports. A pool that is exhausted makes one a request: those that say the same count as one. */
export class Reports {
  #latest: { readonly id: number; readonly times: number; readonly report: Report }[] = []
  /** Raised by each report. */
  version = 0

  add(report: Report): void {
    const [last, ...others] = this.#latest
    this.version++
    if (last !== undefined && isSame(last.report, report)) {
      this.#latest = [{ id: last.id, times: last.times + 1, report }, ...others]
    } else {
      this.#latest = [{ id: this.version, times: 1, report }, ...this.#latest].slice(0, MOST_REPORTS)
    }
  }

  read(): ShownReport[] {
    return this.#latest.map(({ id, times, report }) => show(report, id, times))
  }
}

function isSame(one: Report, other: Report): boolean {
  const { code, verdict } = other
  return (
    one.code === code &&
    one.verdict?.cause === verdict?.cause &&
    String(one.verdict?.routes) === String(verdict?.routes)
  )
}

const routesOf = (verdict: Report['verdict']): string[] =>
  (verdict?.routes ?? []).slice(0, MOST_GROUPS).map((route) => cut(route, 120))

function show(report: Report, id: number, times: number): ShownReport {
  const { at, code, verdict, checkedOut, waiting, holders, waiters } = report
  return {
    id,
    at,
    code,
    cause: verdict?.cause,
    sentence: verdict && cut(verdict.sentence, 2000),
    routes: routesOf(verdict),
    times,
    checkedOut,
    waiting,
    holders: holders.slice(0, MOST_GROUPS).map((group) => ({
      name: labelOf(group),
      count: group.count,
      busy: group.busy,
      oldestMillis: Math.round(group.oldestMillis),
      busyMillis: Math.round(group.busyMillis),
      idleMillis: Math.round(group.idleMillis),
      lastStatement: group.lastStatement && cut(group.lastStatement, 200),
    })),
    waiters: waiters.slice(0, MOST_GROUPS).map((group) => ({
      name: labelOf(group),
      count: group.count,
      oldestMillis: Math.round(group.oldestMillis),
    })),
  }
}
