import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { chartOf } from './chart.ts'
import { machine } from './machine.ts'
import { type Plan, SCENARIOS, type ScenarioName, titleOf } from './plan.ts'
import type { Result } from './results.ts'
import { standings, whereBehind } from './standing.ts'
import { toMarkdown } from './table.ts'
import { tableOf } from './tables.ts'

export interface Run {
  readonly plan: Plan
  readonly results: readonly Result[]
  /** As it was typed. */
  readonly command: string
  readonly postgresVersion: string
  readonly date: Date
}

/** Writes RESULTS.md, and the chart beside it. */
export async function writeReport(folder: string, run: Run): Promise<void> {
  const chart = chartOf(run.results)
  if (chart) await writeFile(join(folder, 'results.svg'), chart)
  await writeFile(join(folder, 'RESULTS.md'), await reportOf(run, chart !== undefined))
}

async function reportOf(run: Run, withChart: boolean): Promise<string> {
  const { results, plan, command, date } = run
  const facts = await machine(run.postgresVersion)
  const parts = [
    '# Results',
    `Written by \`${command}\` on ${date.toISOString().slice(0, 10)}. Compare the rows with each other, not with those of other machines.`,
    `Measured: ${titleOf(plan)}.`,
    withChart ? '![Requests per second relative to hand-written pg](results.svg)' : '',
    '## In short',
    toMarkdown(standings(results)),
    '## Where this plugin is not ahead',
    behind(results),
    '## The machine',
    facts.map(([name, value]) => `- ${name}: ${value}`).join('\n'),
    METHOD,
    ...scenarios(results),
  ]
  return `${parts.filter((part) => part !== '').join('\n\n')}\n`
}

function behind(results: readonly Result[]): string {
  const lines = whereBehind(results)
  if (lines.length === 0) return 'It is ahead of everyone in every closed loop.'
  return ['In brackets its requests/s as a multiple of theirs.', lines.map((line) => `- ${line}`).join('\n')].join(
    '\n\n',
  )
}

function scenarios(results: readonly Result[]): string[] {
  const names = [...new Set(results.map(({ cell }) => cell.scenario))]
  return names.flatMap((name: ScenarioName) => {
    const tables = results.filter(({ cell }) => cell.scenario === name).map((result) => toMarkdown(tableOf(result)))
    return [`## ${name}`, SCENARIOS[name].what, ...tables]
  })
}

const METHOD = `## How it is measured

PostgreSQL runs with its defaults, so with \`fsync\` and \`synchronous_commit\` on, except for \`max_connections=400\`,
\`shared_buffers=256MB\`, and what would fall into one contender's turn and not into another's: autovacuum is off, and
checkpoints are an hour or 2 GB of WAL apart.

Every contender is a Fastify server in a process of its own with the same routes and schemas, no log, and a pool of 20
connections that stay open. \`pg\` by hand awaits BEGIN, each statement and COMMIT, one after the other. The load comes from
another process ([autocannon](https://github.com/mcollina/autocannon)): 64 clients on kept-alive connections, each of
which asks again as soon as it is answered. Only in \`overload\` requests come at a fixed rate, from a generator of the
benchmark's own, since autocannon's clients wait for their answers.

\`1ms\` and \`5ms\` go through a proxy, again a process of its own, that holds back every chunk in either direction for that
long. Node's timers add up to a millisecond, the same for everyone: how long a \`select 1\` really takes is said below each
table. All processes share one machine, so on loopback a contender that leaves more CPU to PostgreSQL is faster for that,
too.

A round loads everybody once, in an order in which nobody keeps the same neighbour, so that what disturbs the machine for a
while disturbs all of them. Before the first round everybody is loaded once and not counted; nor are the first 0.2 s of each
load. Ratios are taken within a round. What is shown is their median over the rounds and, in brackets, an interval of order
statistics, which supposes nothing about their distribution: with six rounds and more it holds the true median with at
least 95 %, with fewer it reaches from the lowest to the highest. The note below each table has the exact level.

Every answer is compared with what it must be. After a load that writes, PostgreSQL is asked: every row that was
acknowledged must be there once, and no other; after every load no transaction may be left open. A contender that fails in
this is marked WRONG and left out of the chart, and the benchmark ends with an error.

## How to read the tables

- **× pg by hand**: requests/s as a multiple of the baseline's, in the same round; **× CPU** likewise. **≈**: no farther from 1
  than the noise, which is what the baseline's own code in another process got. No difference was seen.
- **p50, p99**: response times as the client sees them, of all rounds together. With 64 clients and 20 connections they
  are mostly time in the queue.
- **CPU µs**: of the server's process with all its threads, per request.
- **efficiency**: requests/s as a share of what 20 connections reach that do nothing but \`select 1\`, through the same proxy, in
  the same round. On the delayed networks 1 means one request per connection and round trip. On loopback that loop is
  limited by the CPU of its own process, and the column says little.
- **errors**: requests without the right answer.
- The plugin and Kysely build their statements, for \`pg\` they are texts. \`postgres\` prepares its statements, which is its
  default; the plugin does so only in the row that says so. With \`'onResponse'\` the client has its answer before COMMIT.`
