import { serveParent } from './child.ts'
import { closedLoop } from './load/closed-loop.ts'
import { openLoop } from './load/open-loop.ts'

/*
 * The load generator's own process.
 */

const calls = { closedLoop, openLoop }
export type LoadCalls = typeof calls
serveParent(calls)
