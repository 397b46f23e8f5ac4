/**
 * tsx hands on source maps without the sources, and c8 then takes each file for an empty one that is covered in full.
 * This hook, loaded after tsx, puts the sources of lib/ back, so that the coverage report tells the truth.
 */
import { readFile } from 'node:fs/promises'
import { register } from 'node:module'
import { fileURLToPath } from 'node:url'
import { isMainThread } from 'node:worker_threads'

// Node loads this file a second time in the thread where hooks run.
if (isMainThread) register(import.meta.url)

const library = new URL('../../lib/', import.meta.url).href
const inlineMap = /(?<=\n\/\/# sourceMappingURL=data:application\/json;base64,)\S+/

export async function load(url, context, nextLoad) {
  const loaded = await nextLoad(url, context)
  if (!url.startsWith(library) || !loaded.source) return loaded
  const original = await readFile(fileURLToPath(url), 'utf8')
  const source = String(loaded.source).replace(inlineMap, (base64) => {
    const map = JSON.parse(Buffer.from(base64, 'base64').toString())
    return Buffer.from(JSON.stringify({ ...map, sourcesContent: [original] })).toString('base64')
  })
  return { ...loaded, source }
}
