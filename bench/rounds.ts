import type { Witness } from './database.ts'
import type { ContenderName, PlannedCell } from './plan.ts'
import type { Progress } from './progress.ts'
import type { Stage } from './stage.ts'
import { orderOf } from './statistics.ts'

/** What a turn works with. */
export interface Bench {
  readonly stage: Stage
  readonly witness: Witness
  readonly cell: PlannedCell
}

/** How a contender is measured once. */
export interface Method<Turn> {
  /** Before the first round: everything is compiled and connected. Nothing of it is kept. */
  warmUp(bench: Bench, contender: ContenderName): Promise<unknown>
  turn(bench: Bench, contender: ContenderName, round: number): Promise<Turn>
  /** What the connections could do at best, measured once in every round. */
  bare?(bench: Bench): Promise<number>
}

/** All turns of a cell, in the order of the rounds. */
export interface Measured<Turn> {
  readonly turns: ReadonlyMap<ContenderName, readonly Turn[]>
  readonly bare: readonly number[]
}

/** In every round everybody has one turn, so that what disturbs the machine for a while disturbs all of them. */
export async function measure<Turn>(bench: Bench, method: Method<Turn>, progress: Progress): Promise<Measured<Turn>> {
  const { cell } = bench
  progress.round(cell, 0)
  for (const contender of cell.contenders) await method.warmUp(bench, contender)

  const turns = new Map(cell.contenders.map((contender): [ContenderName, Turn[]] => [contender, []]))
  const bare: number[] = []
  const participants: (ContenderName | 'bare')[] = method.bare ? [...cell.contenders, 'bare'] : [...cell.contenders]
  for (let round = 1; round <= cell.rounds; round++) {
    progress.round(cell, round)
    for (const participant of orderOf(participants, round)) {
      if (participant !== 'bare') turns.get(participant)!.push(await method.turn(bench, participant, round))
      else if (method.bare) bare.push(await method.bare(bench))
    }
  }
  return { turns, bare }
}
