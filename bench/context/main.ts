import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { parseArgs, promisify } from 'node:util'
import { median } from 'simple-statistics'
import { startPostgres } from '../../example-app/postgres.ts'

/*
 * What `asyncContext: true` costs: CPU time of a request with it over that without it, processes of the two taking turns,
 * and the first again as a control. `-- --rounds 9 --requests 4000`. Run it under the Node to be measured.
 */

const { values } = parseArgs({
  options: { rounds: { type: 'string', default: '7' }, requests: { type: 'string', default: '3000' } },
})
const VARIANTS = ['off', 'on', 'off'] as const

const run = promisify(execFile)
const folder = join(import.meta.dirname, '../data/context')
const postgres = await startPostgres({ folder, say: console.error })
try {
  const ratios = new Map<string, number[]>()
  for (let round = 0; round < Number(values.rounds); round++) {
    const [off, on, control] = await oneAfterTheOther()
    for (const url of ['/none', '/read']) {
      note(ratios, `${url} on/off`, on![url]! / off![url]!)
      note(ratios, `${url} off/off`, control![url]! / off![url]!)
    }
  }
  console.log(`Node ${process.version}, CPU time of a request, median of ${values.rounds} ratios`)
  for (const [what, all] of ratios) console.log(`${what.padEnd(16)} ${median(all).toFixed(2)}`)
} finally {
  await postgres.stop()
}
process.exit()

async function oneAfterTheOther(): Promise<Record<string, number>[]> {
  const figures: Record<string, number>[] = []
  for (const variant of VARIANTS) {
    const script = join(import.meta.dirname, 'measured.ts')
    const args = ['--import=tsx', script, postgres.connectionString, variant, values.requests]
    const { stdout } = await run(process.execPath, args)
    figures.push(JSON.parse(stdout))
  }
  return figures
}

function note(ratios: Map<string, number[]>, what: string, ratio: number): void {
  ratios.set(what, [...(ratios.get(what) ?? []), ratio])
}
