import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { t } from '../support/test.ts'

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url))
const folder = here('catalogue')
// What needs processes of its own, or a Kysely of its own.
const ELSEWHERE = [here('../pool/processes.ts'), here('../session/signals.ts')]
const numbersIn = (text: string, pattern: RegExp) =>
  new Set([...text.matchAll(pattern)].map(([, number]) => Number(number)))

t.test('every number of docs/faults.md has its scenario, and every scenario its number', async (t) => {
  const listed = numbersIn(readFileSync(here('../../docs/faults.md'), 'utf8'), /^\| (\d+) \|/gm)
  const played = new Set<number>()
  for (const file of [...readdirSync(folder).map((name) => join(folder, name)), ...ELSEWHERE]) {
    for (const number of numbersIn(readFileSync(file, 'utf8'), /['`]([1-9]\d?|10\d)(?: \S|',)/g)) played.add(number)
  }
  const order = (numbers: Set<number>) => [...numbers].sort((a, b) => a - b)
  t.ok(listed.size > 70)
  t.strictSame(
    order(listed).filter((number) => !played.has(number)),
    [],
  )
  t.strictSame(
    order(played).filter((number) => !listed.has(number)),
    [],
  )
})
