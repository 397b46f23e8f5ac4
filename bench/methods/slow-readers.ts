import type { ContenderName } from '../plan.ts'
import type { Bench, Method } from '../rounds.ts'
import { quantiles } from '../statistics.ts'
import { loop, problemsOf } from './closed-loop.ts'

/** One contender, loaded with reads alone, and while others read large answers slowly. */
export interface SlowTurn {
  readonly alone: Measure
  readonly inCompany: Measure
  /** p99 of the reads in company, as a multiple of the one alone. */
  readonly ratio: number
  readonly errors: number
  readonly problems: readonly string[]
}

interface Measure {
  readonly perSecond: number
  readonly times: Float64Array
}

const READERS = 40
const BYTES_PER_SECOND = 1_000_000

async function turn(bench: Bench, contender: ContenderName, round: number): Promise<SlowTurn> {
  const { stage, witness } = bench
  const { port } = stage.server(contender)
  const alone = await loop(bench, contender, 'read', round)
  await stage.slowReaders.ask('start', { port, readers: READERS, bytesPerSecond: BYTES_PER_SECOND })
  const inCompany = await loop(bench, contender, 'read', round)
  const { complaint } = await stage.slowReaders.ask('stop')
  const contradiction = await witness.complaint({ subject: 'read', ...inCompany })
  const others = [complaint, contradiction].filter((problem) => problem !== undefined)
  return {
    alone,
    inCompany,
    ratio: p99(inCompany.times) / p99(alone.times),
    errors: alone.asked - alone.right + inCompany.asked - inCompany.right,
    problems: [...problemsOf(alone), ...problemsOf(inCompany), ...others],
  }
}

function p99(times: Float64Array): number {
  return quantiles([times], 0.99)[0]!
}

export const slowReaders: Method<SlowTurn> = {
  warmUp: (bench, contender) => loop(bench, contender, 'read', 0),
  turn,
}
