import { join } from 'node:path'
import { stopWithNpm } from '../example-app/npm.ts'
import { startPostgres } from '../example-app/postgres.ts'
import { HELP, readArguments, WrongArguments } from './arguments.ts'
import { POSTGRES_FLAGS, Witness } from './database.ts'
import { NETWORKS, type NetworkName, type Plan, titleOf } from './plan.ts'
import { Processes } from './processes.ts'
import { Progress } from './progress.ts'
import { writeReport } from './report.ts'
import { problemsOf, type Result, resultOf } from './results.ts'
import { Stage } from './stage.ts'
import { toText } from './table.ts'
import { tableOf } from './tables.ts'

// The handlers stay, so that a second Ctrl-C does not cut the first one short.
const stopping = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stopping.abort())
stopWithNpm(() => stopping.abort())

try {
  const plan = readArguments(process.argv.slice(2))
  if (plan) await run(plan)
  else console.log(HELP)
} catch (error) {
  process.exitCode = 1
  if (stopping.signal.aborted) console.error('\nStopped')
  else console.error(error instanceof WrongArguments ? `${error.message}\n\n${HELP}` : error)
}

async function run(plan: Plan): Promise<void> {
  const progress = new Progress(plan.cells)
  const say = (line: string) => progress.say(line)
  const postgres = await startPostgres({ folder: join(import.meta.dirname, 'data'), flags: POSTGRES_FLAGS, say })
  const witness = new Witness(postgres.connectionString)
  const results: Result[] = []
  try {
    await witness.open()
    for (const network of Object.keys(NETWORKS) as NetworkName[])
      results.push(...(await onNetwork(network, plan, postgres.connectionString, witness, progress)))
    progress.clear()
    print(plan, results)
    if (plan.write) {
      const postgresVersion = await witness.version()
      await writeReport(import.meta.dirname, { plan, results, command: command(), postgresVersion, date: new Date() })
    }
  } finally {
    await witness.close().catch(() => {})
    await postgres.stop()
  }
}

/** Its processes are started for it, and stopped whatever happens. */
async function onNetwork(
  network: NetworkName,
  { cells }: Plan,
  connectionString: string,
  witness: Witness,
  progress: Progress,
): Promise<Result[]> {
  const here = cells.filter((cell) => cell.network === network)
  const contenders = [...new Set(here.flatMap((cell) => cell.contenders))]
  const results: Result[] = []
  if (here.length === 0) return results
  const processes = new Processes()
  const stop = () => void processes.stop()
  stopping.signal.addEventListener('abort', stop)
  try {
    stopping.signal.throwIfAborted()
    const stage = await Stage.open(processes, network, contenders, connectionString)
    for (const cell of here) results.push(await resultOf({ stage, witness, cell }, progress))
    return results
  } finally {
    stopping.signal.removeEventListener('abort', stop)
    await processes.stop()
  }
}

/** As it was typed. */
function command(): string {
  const args = process.argv.slice(2)
  return args.length === 0 ? 'npm run bench' : `npm run bench -- ${args.join(' ')}`
}

function print(plan: Plan, results: readonly Result[]): void {
  const colours = process.stdout.isTTY && !process.env.NO_COLOR
  console.log(`\n${titleOf(plan)}`)
  for (const result of results) console.log(`\n${toText(tableOf(result), colours)}`)
  if (results.some((result) => problemsOf(result).size > 0)) process.exitCode = 1
}
