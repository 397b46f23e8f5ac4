import type { Block, Page } from './page.ts'

/** What is between two `<!-- another module -->` of a page: files that know each other, and a database of their own. */
export interface PageModule {
  readonly page: string
  readonly number: number
  /**
   * By path. The blocks without a file name are `page.ts`. Each line stands on the line that it has on the page, so
   * that whoever complains of one names the page's.
   */
  readonly files: ReadonlyMap<string, string>
  readonly sql: readonly Block[]
  /** The files that no other one imports, in the page's order: what has to be run. */
  readonly entries: readonly string[]
  readonly tests: readonly string[]
}

/** The file of the blocks that name none. */
const PAGE_FILE = 'page.ts'

export function modulesOf(page: Page): PageModule[] {
  const numbers = new Set(page.blocks.map(({ module }) => module))
  return Array.from(numbers, (number) => moduleOf(page, number)).filter(({ files }) => files.size > 0)
}

function moduleOf(page: Page, number: number): PageModule {
  const blocks = page.blocks.filter(({ module }) => module === number)
  const code = blocks.filter(({ language, file }) => language === 'ts' || (language === 'js' && file !== undefined))
  const names = new Set(code.map(({ file }) => file ?? PAGE_FILE))
  const partsOf = (name: string) => code.filter(({ file }) => (file ?? PAGE_FILE) === name)
  const files = new Map(Array.from(names, (name) => [name, withoutRepeatedImports(inPlace(partsOf(name)))]))
  const imported = new Set(Array.from(files, ([file, text]) => importsOf(file, text)).flat())
  const roots = [...files.keys()].filter((file) => !imported.has(file))
  const isTest = (file: string) => /[./]test\.ts$/.test(file)
  return {
    page: page.name,
    number,
    files,
    sql: blocks.filter(({ language }) => language === 'sql'),
    entries: roots.filter((file) => !isTest(file)),
    tests: roots.filter(isTest),
  }
}

/** Each line on its own line of the page. */
function inPlace(blocks: readonly Block[]): string {
  const lines: string[] = []
  for (const block of blocks) {
    while (lines.length < block.line - 1) lines.push('')
    lines.push(...block.lines)
  }
  return `${lines.join('\n')}\n`
}

const IMPORT = /^import (type )?(?:(\w+),? )?(?:\{([^}]*)\} )?(?:from )?'([^']+)'$/gm

/** A page may import in each block what that block needs; a module may do so once. */
function withoutRepeatedImports(text: string): string {
  const seen = new Set<string>()
  const isNew = (name: string) => name !== '' && !seen.has(name) && seen.add(name)
  return text.replace(IMPORT, (statement, type = '', byDefault = '', braces: string | undefined, from: string) => {
    if (byDefault === '' && braces === undefined) return statement
    const own = isNew(byDefault) ? byDefault : ''
    const names = (braces ?? '').split(',').map((name) => name.trim())
    const fresh = names.filter((name) => isNew(name.replace(/^type /, '')))
    const what = [own, fresh.length > 0 ? `{ ${fresh.join(', ')} }` : ''].filter((part) => part !== '').join(', ')
    // As many lines as before.
    const rest = '\n'.repeat(statement.split('\n').length - 1)
    return what === '' ? rest : `import ${type}${what} from '${from}'${rest}`
  })
}

/** The files beside it that a file imports, as paths of the module's folder. */
function importsOf(file: string, text: string): string[] {
  return Array.from(text.matchAll(/(?:from|import|import\() ?'(\.[^']+)'/g), ([, path = '']) =>
    new URL(path, `file:///${file}`).pathname.slice(1),
  )
}
