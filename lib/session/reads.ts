import type { CompiledQuery, RootOperationNode, SelectQueryNode } from 'kysely'

const WRITES = new Set(['InsertQueryNode', 'UpdateQueryNode', 'DeleteQueryNode', 'MergeQueryNode'])
// What the server says of a statement that has changed nothing.
const READING = new Set(['SELECT', 'SHOW', 'EXPLAIN', 'FETCH'])
const WRITING_WITH = /^\s*with\b.*\b(insert|update|delete|merge)\b/is
// Raw reads that somebody has vouched for.
const vouched = new WeakSet<CompiledQuery>()

/** Somebody says that this query only reads. @throws TypeError where that cannot be */
export function vouchFor(query: CompiledQuery): void {
  if (WRITES.has(query.query.kind)) throw new TypeError('remember(query) takes a query that reads')
  vouched.add(query)
}

/** Whether a statement surely changes nothing: a select from tables, without SQL of unknown effect where it could write. */
export function surelyReads(query: CompiledQuery): boolean {
  return isSelect(query.query) || vouched.has(query)
}

// A select of functions alone, such as nextval() or set_config(), is there for what it does.
function isSelect(node: RootOperationNode): boolean {
  if (node.kind !== 'SelectQueryNode') return false
  const { from, with: common } = node as SelectQueryNode
  return (
    from !== undefined && (common?.expressions ?? []).every(({ expression }) => expression.kind === 'SelectQueryNode')
  )
}

/** Whether a statement that was no such read has written after all, by what the server says it has done. */
export function hasWritten(text: string, command: string | null): boolean {
  return (command !== null && !READING.has(command)) || WRITING_WITH.test(text)
}
