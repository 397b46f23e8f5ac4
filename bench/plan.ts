/*
 * What there is to be measured. Names are those of the command line.
 */

/** Delays in each direction, in milliseconds, between a server and PostgreSQL. */
export const NETWORKS = { loopback: 0, '1ms': 1, '5ms': 5 } as const
export type NetworkName = keyof typeof NETWORKS

export interface Scenario {
  /** One sentence for those who read the results. */
  readonly what: string
  readonly method: 'closed loop' | 'slow readers' | 'overload'
  readonly networks: readonly NetworkName[]
  /** Everybody is compared with this contender, and the noise is that of the same code in another process. */
  readonly baseline: ContenderName
  readonly control: ContenderName
  readonly rounds: number
  readonly seconds: number
}

const everywhere = ['loopback', '1ms', '5ms'] as const
const byHand = { baseline: 'pg', control: 'pg-again' } as const
const inALoop = { method: 'closed loop', ...byHand, networks: everywhere, rounds: 6, seconds: 0.5 } as const

export const SCENARIOS = {
  read: { ...inALoop, what: 'One row by its primary key, in a transaction.' },
  update: { ...inALoop, what: 'A count is read, then updated with `returning`, in one transaction.' },
  insert: { ...inALoop, what: 'One row is inserted, nothing is read. The plugin: `request.db.add(query)`.' },
  five: {
    ...inALoop,
    what: 'Five rows by their primary keys, in one transaction: side by side where it can be done (the plugin, `postgres`), one after the other with a `pg` client.',
  },
  untouched: {
    ...inALoop,
    what: 'A route that uses no database, on a server that has the plugin, and on one without it.',
    networks: ['loopback'],
    baseline: 'fastify',
    control: 'fastify-again',
  },
  slow: {
    ...byHand,
    what: '`read`, alone and while 40 other clients fetch 6 MB each, after one read in the session, at 1 MB/s. With `onResponse` a transaction ends, and gives its connection back, when its client has read everything.',
    method: 'slow readers',
    networks: ['loopback'],
    rounds: 6,
    seconds: 0.6,
  },
  overload: {
    ...byHand,
    what: '800 requests/s, whoever waits or not, that read a row and then hold their transaction for 100 ms: four times what 20 connections can serve. Beside them 200 requests/s for a route without database. Where nothing is said of it, nobody limits the queue but the plugin: to 1000.',
    method: 'overload',
    networks: ['loopback'],
    rounds: 3,
    seconds: 1,
  },
} as const satisfies Record<string, Scenario>
export type ScenarioName = keyof typeof SCENARIOS

export interface Contender {
  readonly title: string
  /** Its file in contenders/. */
  readonly file: string
  readonly options?: Record<string, unknown>
  readonly ours?: boolean
  /** Where it takes part, if not in everything that uses the database. */
  readonly only?: readonly string[]
  /** Where else it takes part. */
  readonly also?: readonly string[]
}

export const CONTENDERS = {
  pg: { title: 'pg by hand', file: 'pg' },
  'pg-again': { title: 'pg by hand, again', file: 'pg' },
  'pg-named': { title: 'pg by hand, named statements', file: 'pg', options: { named: true } },
  kysely: { title: 'Kysely, transaction()', file: 'kysely' },
  'fastify-postgres': { title: '@fastify/postgres, transact', file: 'fastify-postgres' },
  postgres: { title: 'postgres, begin', file: 'postgres' },
  ours: { title: 'this plugin', file: 'ours', ours: true, also: ['untouched'] },
  'ours-on-response': {
    title: "this plugin, 'onResponse'",
    file: 'ours',
    options: { commitOn: 'onResponse' },
    ours: true,
    also: ['untouched'],
  },
  'ours-prepared': {
    title: 'this plugin, prepared',
    file: 'ours',
    options: { preparedStatements: { cacheSize: 256 } },
    ours: true,
  },
  'ours-max-waiting': {
    title: 'this plugin, maxWaiting 20',
    file: 'ours',
    options: { pool: { maxWaiting: 20 } },
    ours: true,
    only: ['overload'],
  },
  fastify: { title: 'bare Fastify', file: 'fastify', only: ['untouched'] },
  'fastify-again': { title: 'bare Fastify, again', file: 'fastify', only: ['untouched'] },
} as const satisfies Record<string, Contender>
export type ContenderName = keyof typeof CONTENDERS

/** Who takes part in a scenario. */
export function contendersOf(scenario: ScenarioName): ContenderName[] {
  const names = Object.keys(CONTENDERS) as ContenderName[]
  return names.filter((name) => {
    const { only, also = [] }: Contender = CONTENDERS[name]
    return only ? only.includes(scenario) : scenario !== 'untouched' || also.includes(scenario)
  })
}

/** What one run does. */
export interface Plan {
  readonly name: 'full' | 'quick' | 'custom'
  readonly cells: readonly PlannedCell[]
  /** Whether RESULTS.md and the chart are written. */
  readonly write: boolean
}

/** One scenario on one network: one table. */
export interface PlannedCell {
  readonly scenario: ScenarioName
  readonly network: NetworkName
  readonly contenders: readonly ContenderName[]
  readonly rounds: number
  readonly seconds: number
}

/** What a run is about, in one line: `quick: read, update; loopback, 5ms; pg, ours; 3 rounds of 0.6 s`. */
export function titleOf({ name, cells }: Plan): string {
  const all = (list: readonly string[]) => [...new Set(list)].join(', ')
  return [
    `${name}: ${all(cells.map(({ scenario }) => scenario))}`,
    all(cells.map(({ network }) => network)),
    all(cells.flatMap(({ contenders }) => contenders)),
    all(cells.map(({ rounds, seconds }) => `${rounds} rounds of ${seconds} s`)),
  ].join('; ')
}

/** What `--quick` is. */
export const QUICK = {
  scenarios: ['read', 'update'],
  networks: ['5ms', 'loopback'],
  contenders: ['pg', 'pg-again', 'ours'],
  rounds: 3,
  seconds: 0.6,
} as const satisfies Partial<Wishes>

/** What the command line asks for. What is left out is the default of each scenario. */
export interface Wishes {
  readonly scenarios?: readonly ScenarioName[] | undefined
  readonly networks?: readonly NetworkName[] | undefined
  readonly contenders?: readonly ContenderName[] | undefined
  readonly rounds?: number | undefined
  readonly seconds?: number | undefined
}

/** The networks one after the other, since servers are started for one of them. */
export function plannedCells(wishes: Wishes): PlannedCell[] {
  const networks = Object.keys(NETWORKS) as NetworkName[]
  const scenarios = wishes.scenarios ?? (Object.keys(SCENARIOS) as ScenarioName[])
  return networks.flatMap((network) => scenarios.flatMap((scenario) => plannedCell(scenario, network, wishes) ?? []))
}

function plannedCell(scenario: ScenarioName, network: NetworkName, wishes: Wishes): PlannedCell | undefined {
  const { networks, baseline, control, rounds, seconds }: Scenario = SCENARIOS[scenario]
  if (!(wishes.networks ?? networks).includes(network)) return undefined
  const asked: readonly ContenderName[] = wishes.contenders ?? contendersOf(scenario)
  if (!contendersOf(scenario).some((name) => asked.includes(name))) return undefined
  // Without the one that all are compared with, and without the noise, there is nothing to say.
  const wanted = new Set([baseline, control, ...asked])
  const contenders = contendersOf(scenario).filter((name) => wanted.has(name))
  return { scenario, network, contenders, rounds: wishes.rounds ?? rounds, seconds: wishes.seconds ?? seconds }
}
