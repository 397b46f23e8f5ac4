import { setTimeout as sleep } from 'node:timers/promises'
import type { OpenOutcome } from '../load/open-loop.ts'
import type { ContenderName } from '../plan.ts'
import type { Bench, Method } from '../rounds.ts'
import { quantiles } from '../statistics.ts'
import { loop } from './closed-loop.ts'

/** One contender, offered more than its pool can serve. */
export interface OverloadTurn {
  /** Right answers a second. */
  readonly goodput: number
  readonly served: Float64Array
  /** How fast it said no, and to which share of the requests. */
  readonly refused: Float64Array
  readonly refusedShare: number
  /** Response times of the route without database, alone and beside the overload. */
  readonly besideAlone: Float64Array
  readonly beside: Float64Array
  /** Their p99, as a multiple of the one alone. */
  readonly ratio: number
  readonly errors: number
  readonly problems: readonly string[]
}

const OFFERED = { subject: 'held', perSecond: 800 } as const
const BESIDE = { subject: 'untouched', perSecond: 200 } as const
/** Longer than a request is held, so that what is counted is no beginning. */
const WARM_UP_MILLIS = 500
/** For what waits in line although its client has left. */
const QUIET_WITHIN_MILLIS = 60_000

async function turn(bench: Bench, contender: ContenderName): Promise<OverloadTurn> {
  const { stage, witness, cell } = bench
  const { port } = stage.server(contender)
  const load = { port, warmUpMillis: WARM_UP_MILLIS, millis: cell.seconds * 1000 }
  const alone = await stage.secondLoad.ask('openLoop', { ...load, ...BESIDE })
  const [offered, beside] = await Promise.all([
    stage.load.ask('openLoop', { ...load, ...OFFERED }),
    stage.secondLoad.ask('openLoop', { ...load, ...BESIDE }),
  ])
  await untilQuiet(bench, contender)
  const contradiction = await witness.complaint({ subject: 'held', asked: 0, right: 0, sum: 0 })
  return summary([alone, offered, beside], cell.seconds, contradiction)
}

function summary(
  [alone, offered, beside]: readonly [OpenOutcome, OpenOutcome, OpenOutcome],
  seconds: number,
  contradiction: string | undefined,
): OverloadTurn {
  const problems = [alone.complaint, offered.complaint, beside.complaint, contradiction]
  return {
    goodput: offered.served.length / seconds,
    served: offered.served,
    refused: offered.refused,
    refusedShare: offered.refused.length / offered.asked,
    besideAlone: alone.served,
    beside: beside.served,
    ratio: p99(beside.served) / p99(alone.served),
    errors: alone.wrong + offered.wrong + beside.wrong,
    problems: problems.filter((problem) => problem !== undefined),
  }
}

async function untilQuiet({ stage }: Bench, contender: ContenderName): Promise<void> {
  const deadline = performance.now() + QUIET_WITHIN_MILLIS
  while ((await stage.server(contender).usage()).held > 0) {
    if (performance.now() > deadline) throw new Error(`${contender} still works off its queue`)
    await sleep(50)
  }
}

function p99(times: Float64Array): number {
  return quantiles([times], 0.99)[0]!
}

export const overload: Method<OverloadTurn> = {
  warmUp: (bench, contender) => loop(bench, contender, 'read', 0),
  turn,
}
