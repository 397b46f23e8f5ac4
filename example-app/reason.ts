/** What went wrong at the start, in one line. The plugin's own texts are made for clients: what lies below says more. */
export function reasonOf(error: unknown): string {
  return messageOf(deepestCause(error)).split('\n', 1)[0] ?? ''
}

function deepestCause(error: unknown): unknown {
  return error instanceof Error && error.cause ? deepestCause(error.cause) : error
}

function messageOf(error: unknown): string {
  // A host with several addresses: one error for each, and none for all.
  if (error instanceof AggregateError && !error.message) return error.errors.map(messageOf).join(', ')
  return error instanceof Error ? error.message : String(error)
}
