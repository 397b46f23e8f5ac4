import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { compile } from './support/compiler.ts'

// test/types is a user's project in small; it imports the built package by its name.
t.test('the types accept what must compile and refuse what must not, for a strict user of NodeNext', async (t) => {
  t.equal(await compile('test/types'), '')
})

t.test('and for a user with a bundler and without exactOptionalPropertyTypes', async (t) => {
  const flags = ['--module', 'preserve', '--moduleResolution', 'bundler', '--exactOptionalPropertyTypes', 'false']
  t.equal(await compile('test/types', ...flags), '')
})

t.test('the compiler that these tests trust does find an error', async (t) => {
  const folder = fileURLToPath(new URL('../.tap/types', import.meta.url))
  await mkdir(folder, { recursive: true })
  await writeFile(
    join(folder, 'tsconfig.json'),
    JSON.stringify({ extends: '../../test/types/tsconfig.json', include: ['*.ts'] }),
  )
  await writeFile(join(folder, 'wrong.ts'), "import db from 'fastify-request-db'\nexport const wrong: number = db\n")
  t.match(await compile(folder), /wrong\.ts.*error TS2322/)
})
