import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import pg from 'pg'
import { stopWithNpm } from '../../example-app/npm.ts'
import { startPostgres } from '../../example-app/postgres.ts'
import { CONTENDERS, type ContenderName } from './contenders.ts'
import { SURVIVES } from './judge.ts'
import { reportOf, tableOf, type Verdicts } from './report.ts'
import { SCENARIOS } from './scenarios.ts'
import { trial } from './trial.ts'
import { SCHEMA } from './witness.ts'

/*
 * Poses the same faults to this plugin and to others, and writes bench/SURVIVAL.md. `-- --only killed` tries the scenarios
 * that are called so, `-- --with pg` one contender (both can be repeated); then nothing is written.
 */

const AT_ONCE = 2
const FLAGS = ['max_connections=100']

const { values } = parseArgs({
  options: { only: { type: 'string', multiple: true }, with: { type: 'string', multiple: true } },
})
const contenders = (Object.keys(CONTENDERS) as ContenderName[]).filter((name) => values.with?.includes(name) ?? true)
const scenarios = SCENARIOS.filter(({ name }) => values.only?.some((part) => name.includes(part)) ?? true)

const stopping = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stopping.abort())
stopWithNpm(() => stopping.abort())

const folder = join(import.meta.dirname, '../data/survival')
const postgres = await startPostgres({ folder, flags: FLAGS, say: console.error })
try {
  const postgresVersion = await prepare(postgres.connectionString)
  const verdicts = await tryAll(postgres.connectionString)
  console.log(tableOf({ verdicts, contenders }))
  if ([...verdicts.values()].some((of) => (of.get('ours') ?? SURVIVES) !== SURVIVES)) process.exitCode = 1
  if (!values.only && !values.with) {
    const report = await reportOf({ verdicts, contenders, postgresVersion, date: new Date() })
    await writeFile(join(import.meta.dirname, '../SURVIVAL.md'), report)
  }
} catch (error) {
  process.exitCode = 1
  console.error(stopping.signal.aborted ? 'Stopped' : error)
} finally {
  await postgres.stop()
}
process.exit()

async function prepare(connectionString: string): Promise<string> {
  const client = new pg.Client({ connectionString })
  await client.connect()
  await client.query(SCHEMA)
  const { rows } = await client.query<{ server_version: string }>('show server_version')
  await client.end()
  return rows[0]!.server_version
}

async function tryAll(connectionString: string): Promise<Verdicts> {
  const verdicts = new Map(scenarios.map(({ name }) => [name, new Map<ContenderName, string>()]))
  const trials = scenarios.flatMap((scenario) => contenders.map((contender) => ({ scenario, contender })))
  const worker = async () => {
    for (let next = trials.shift(); next; next = trials.shift()) {
      stopping.signal.throwIfAborted()
      const { scenario, contender } = next
      const verdict = await trial(connectionString, contender, scenario)
      verdicts.get(scenario.name)?.set(contender, verdict)
      console.error(`${scenario.name}, ${contender}: ${verdict}`)
    }
  }
  await Promise.all(Array.from({ length: AT_ONCE }, worker))
  return verdicts
}
