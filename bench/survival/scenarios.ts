import type { Scenario } from './scenario.ts'
import { CLIENTS } from './scenarios/clients.ts'
import { COMMITS } from './scenarios/commits.ts'
import { CONNECTIONS } from './scenarios/connections.ts'
import { HANDLERS } from './scenarios/handlers.ts'

/** All scenarios, in the order of the table. */
export const SCENARIOS: readonly Scenario[] = [...CONNECTIONS, ...COMMITS, ...HANDLERS, ...CLIENTS]
