import { POOL_SIZE } from '../contender.ts'
import type { ClosedOutcome } from '../load/closed-loop.ts'
import type { ContenderName } from '../plan.ts'
import type { Subject } from '../questions.ts'
import type { Bench, Method } from '../rounds.ts'

/** One contender, loaded once by clients that each ask again as soon as they are answered. */
export interface ClosedTurn {
  readonly perSecond: number
  readonly times: Float64Array
  /** CPU time of the server process per answer, in microseconds. */
  readonly cpuMicros: number
  readonly errors: number
  /** Share of one core that the load generator needed. */
  readonly loadCpu: number
  readonly problems: readonly string[]
}

const CLIENTS = 64
/** New connections, the first requests on them, the pings of connections that were idle. */
const WARM_UP_MILLIS = 200
/** Of a whole cell. */
const FIRST_WARM_UP_MILLIS = 1500

/** Loads a contender once. */
export function loop(
  { stage, cell }: Bench,
  contender: ContenderName,
  subject: Subject,
  round: number,
): Promise<ClosedOutcome> {
  const { port } = stage.server(contender)
  const millis = round === 0 ? FIRST_WARM_UP_MILLIS : cell.seconds * 1000
  return stage.load.ask('closedLoop', { port, subject, clients: CLIENTS, warmUpMillis: WARM_UP_MILLIS, millis, round })
}

/** What was wrong with a load. */
export function problemsOf({ asked, answered, complaint }: ClosedOutcome): string[] {
  const unanswered = asked === answered ? undefined : `${asked - answered} requests were not answered`
  return [complaint, unanswered].filter((problem) => problem !== undefined)
}

async function turn(bench: Bench, contender: ContenderName, round: number): Promise<ClosedTurn> {
  const { stage, witness } = bench
  const subject = subjectOf(bench)
  const server = stage.server(contender)
  await witness.remember(subject)
  const before = await server.usage()
  const outcome = await loop(bench, contender, subject, round)
  // What a contender puts off until after its answers is its work, too: its CPU time is looked at when all is settled.
  const contradiction = await witness.complaint({ subject, ...outcome })
  const after = await server.usage()
  return {
    perSecond: outcome.perSecond,
    times: outcome.times,
    cpuMicros: (after.cpuMicros - before.cpuMicros) / outcome.answered,
    errors: outcome.asked - outcome.right,
    loadCpu: outcome.loadCpu,
    problems: [...problemsOf(outcome), ...(contradiction ? [contradiction] : [])],
  }
}

/** The scenarios of this method are called what they ask for. */
function subjectOf({ cell }: Bench): Subject {
  return cell.scenario as Subject
}

export const closedLoop: Method<ClosedTurn> = {
  // The same, so that nothing of it is left to be done in the first round.
  warmUp: (bench, contender) => turn(bench, contender, 0),
  turn,
  bare: ({ stage, cell }) =>
    stage.bare.ask('loop', { connections: POOL_SIZE, warmUpMillis: WARM_UP_MILLIS, millis: cell.seconds * 1000 }),
}

/** Without a database there is no pool that could be efficient. */
export const closedLoopWithoutDatabase: Method<ClosedTurn> = { warmUp: closedLoop.warmUp, turn }
