import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** The TypeScript blocks of a document, in their order. */
export async function blocksOf(document: string): Promise<string[]> {
  const text = await readFile(join(root, document), 'utf8')
  return Array.from(text.matchAll(/^```ts\n([\s\S]*?)^```/gm), ([, code]) => code as string)
}

/**
 * A project of one module, in the package's own folder, so that it finds the built package by name, as a user's code
 * would. Returns its folder, where the module is `example.ts`.
 */
export async function projectOf(name: string, module: string): Promise<string> {
  const folder = join(root, '.tap', name)
  await mkdir(folder, { recursive: true })
  await writeFile(join(folder, 'example.ts'), module)
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ extends: '../../tsconfig.json', include: ['*.ts'] }))
  return folder
}
