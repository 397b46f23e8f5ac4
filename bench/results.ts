import { type ClosedTurn, closedLoop, closedLoopWithoutDatabase } from './methods/closed-loop.ts'
import { type OverloadTurn, overload } from './methods/overload.ts'
import { type SlowTurn, slowReaders } from './methods/slow-readers.ts'
import { type ContenderName, type PlannedCell, SCENARIOS } from './plan.ts'
import type { Progress } from './progress.ts'
import { type Bench, type Measured, measure } from './rounds.ts'

/** Everything that was measured of one scenario on one network. */
export type Result = { readonly cell: PlannedCell; readonly roundTripMillis: number } & (
  | { readonly method: 'closed loop'; readonly measured: Measured<ClosedTurn> }
  | { readonly method: 'slow readers'; readonly measured: Measured<SlowTurn> }
  | { readonly method: 'overload'; readonly measured: Measured<OverloadTurn> }
)

export async function resultOf(bench: Bench, progress: Progress): Promise<Result> {
  const { cell, stage } = bench
  const about = { cell, roundTripMillis: stage.roundTripMillis }
  const { method, baseline } = SCENARIOS[cell.scenario]
  switch (method) {
    case 'slow readers':
      return { ...about, method, measured: await measure(bench, slowReaders, progress) }
    case 'overload':
      return { ...about, method, measured: await measure(bench, overload, progress) }
    case 'closed loop': {
      const loop = baseline === 'fastify' ? closedLoopWithoutDatabase : closedLoop
      return { ...about, method, measured: await measure(bench, loop, progress) }
    }
  }
}

/** What contenders did wrong, each thing once. */
export function problemsOf({ measured }: Result): Map<ContenderName, string[]> {
  const problems = new Map<ContenderName, string[]>()
  for (const [contender, turns] of measured.turns) {
    const own = new Set(turns.flatMap((turn) => turn.problems))
    if (own.size > 0) problems.set(contender, [...own])
  }
  return problems
}
