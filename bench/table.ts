/** What is printed on the terminal and written into RESULTS.md. */
export interface Table {
  readonly title: string
  readonly columns: readonly string[]
  readonly rows: readonly Row[]
  /** Below it, a line each. */
  readonly notes: readonly string[]
}

export interface Row {
  readonly cells: readonly string[]
  /** Set off from the others where that can be done. */
  readonly ours: boolean
}

const BOLD = '\x1b[1m'
const NORMAL = '\x1b[22m'

/** The first column to the left, numbers to the right. */
export function toText({ title, columns, rows, notes }: Table, colours = false): string {
  const widths = columns.map((column, index) =>
    Math.max(column.length, ...rows.map(({ cells }) => cells[index]!.length)),
  )
  const line = (cells: readonly string[]) =>
    cells.map((cell, index) => (index === 0 ? cell.padEnd(widths[0]!) : cell.padStart(widths[index]!))).join('  ')
  const heading = [title, '', line(columns), line(widths.map((width) => '-'.repeat(width)))]
  const body = rows.map(({ cells, ours }) => (ours && colours ? `${BOLD}${line(cells)}${NORMAL}` : line(cells)))
  return [...heading, ...body, '', ...notes].join('\n')
}

export function toMarkdown({ title, columns, rows, notes }: Table): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`
  const heading = [`### ${title}`, '', line(columns), line(columns.map((_, index) => (index === 0 ? '---' : '---:')))]
  const body = rows.map(({ cells, ours }) => line(ours ? [`**${cells[0]}**`, ...cells.slice(1)] : cells))
  return [...heading, ...body, '', notes.join('  \n')].join('\n')
}
