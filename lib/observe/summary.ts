// Comments, strings (also E'' and $tag$ ones), names (plain, quoted, with a schema), and else one sign at a time.
const TOKEN =
  /--[^\n]*|\/\*[\s\S]*?\*\/|[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\$((?:[\p{L}_]\w*)?)\$[\s\S]*?\$\1\$|(?:"(?:[^"]|"")*"|[\p{L}_][\p{L}\w$]*)(?:\s*\.\s*(?:"(?:[^"]|"")*"|[\p{L}_][\p{L}\w$]*))*|\S/gu
const NAME = /^[\p{L}_"]/u
const VERBS = new Set(['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'MERGE'])
const BEFORE_TABLE = new Set(['FROM', 'INTO', 'JOIN'])
// They can stand between these and the table, or where one would be.
const NO_TABLE = new Set(['ONLY', 'LATERAL'])
// Whatever tells statements apart comes early; a bulk insert can go on for a megabyte.
const MOST_READ = 2000
const MOST_SAID = 255
const MOST_KNOWN = 500

/** What a statement is, such as `SELECT`, and also on which tables: `SELECT trips users`. */
export interface Summary {
  readonly operation: string
  readonly text: string
}

// An app has few statements and sends them often. One that makes them up has this emptied now and then.
const known = new Map<string, Summary>()

/** Verb and tables of a statement, without subqueries, values and aliases: few different ones, and nothing secret. */
export function summarize(statement: string): Summary {
  // The start of a long string would keep all of it in memory.
  if (statement.length > MOST_READ) return read(statement.slice(0, MOST_READ))
  let summary = known.get(statement)
  if (summary === undefined) {
    if (known.size >= MOST_KNOWN) known.clear()
    summary = read(statement)
    known.set(statement, summary)
  }
  return summary
}

function read(statement: string): Summary {
  let operation = ''
  let tables = ''
  let isTableNext = false
  let depth = 0
  let before = ''
  for (const [token] of statement.matchAll(TOKEN)) {
    if (token.startsWith('--') || token.startsWith('/*')) continue
    if (token === '(') depth++
    else if (token === ')') depth--
    const word = token.toUpperCase()
    if (operation === '' || (operation === 'WITH' && depth === 0 && VERBS.has(word))) {
      if (NAME.test(token)) operation = word
      isTableNext = word === 'UPDATE'
    } else if (isTableNext && NO_TABLE.has(word)) {
      continue
    } else {
      if (isTableNext && depth === 0 && NAME.test(token)) tables += ` ${token.replace(/"|\s*(?=\.)/g, '')}`
      // `a is distinct from b` names no table.
      isTableNext = depth === 0 && BEFORE_TABLE.has(word) && before !== 'DISTINCT'
    }
    before = word
  }
  return { operation, text: (operation + tables).slice(0, MOST_SAID) }
}
