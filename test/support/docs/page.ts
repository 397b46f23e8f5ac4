import { readFile } from 'node:fs/promises'
import { join } from 'node:path'

/** A fenced block of a page. */
export interface Block {
  readonly language: string
  /** Of its first line of text, from 1. */
  readonly line: number
  readonly lines: readonly string[]
  /** The file that its first line names, as in `// routes/trips.ts`. */
  readonly file: string | undefined
  /** Which of the page's modules it belongs to, from 1. */
  readonly module: number
}

export interface Page {
  /** From the project's folder: docs/kysely.md. */
  readonly name: string
  readonly text: string
  readonly blocks: readonly Block[]
}

const ANOTHER_MODULE = '<!-- another module -->'

/** Reads what the fences of a page hold. */
export async function readPage(root: string, name: string): Promise<Page> {
  return pageOf(name, await readFile(join(root, name), 'utf8'))
}

export const pageOf = (name: string, text: string): Page => ({ name, text, blocks: blocksOf(text, name) })

function blocksOf(text: string, page: string): Block[] {
  const blocks: Block[] = []
  let open: { fence: string; language: string; line: number; lines: string[] } | undefined
  let module = 1
  for (const [index, line] of text.split('\n').entries()) {
    if (open === undefined) {
      const [, fence, language = ''] = /^ {0,3}(`{3,}|~{3,})(\S*)/.exec(line) ?? []
      if (fence !== undefined) open = { fence, language, line: index + 2, lines: [] }
      else if (line.trim() === ANOTHER_MODULE) module += 1
    } else if (line.trim() === open.fence) {
      const { fence: _, ...block } = open
      blocks.push({ ...block, file: fileOf(block.lines[0]), module })
      open = undefined
    } else open.lines.push(line)
  }
  if (open !== undefined) throw new Error(`${page}:${open.line - 1}: the block is not closed`)
  return blocks
}

const fileOf = (line = '') => /^(?:\/\/|#|--) ([\w./-]+\.\w+)$/.exec(line)?.[1]

/** Where the page's links to files and headings lead nowhere: `page:line: …`. */
export async function brokenLinks(page: Page, read: (file: string) => Promise<string | undefined>): Promise<string[]> {
  const broken: string[] = []
  for (const [index, line] of page.text.split('\n').entries()) {
    for (const [, target = ''] of line.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target)) continue
      const [path = '', heading] = target.split('#')
      const text = path === '' ? page.text : await read(join(page.name, '..', path))
      const isThere = text !== undefined && (heading === undefined || anchors(text).has(heading))
      if (!isThere) broken.push(`${page.name}:${index + 1}: ${target} leads nowhere`)
    }
  }
  return broken
}

/** As GitHub makes them of headings. */
function anchors(text: string): Set<string> {
  const withoutCode = text.replace(/^```[\s\S]*?^```/gm, '')
  return new Set(
    Array.from(withoutCode.matchAll(/^#+ (.*)$/gm), ([, heading = '']) =>
      heading
        .toLowerCase()
        .replace(/[^\p{L}\p{N}\s_-]/gu, '')
        .trim()
        .replaceAll(' ', '-'),
    ),
  )
}
