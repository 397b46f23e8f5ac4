interface Remembered {
  readonly rows: Promise<readonly unknown[]>
  /** They have come. Before, somebody who waits for them could wait for himself. */
  isThere: boolean
}

/**
 * What a session has read with `remember`, for whoever asks the same again: by scope, since what a nested transaction
 * reads can be its own doing. A write, a rollback and a commit throw all of it away.
 */
export class Memory {
  #byScope = new Map<object, Map<string, Remembered>>()

  /** Rows for `key`, remembered in one of `scopes`, outermost first, or read now in the innermost. A copy for each. */
  async rows<Row>(scopes: readonly object[], key: string, read: () => Promise<readonly Row[]>): Promise<Row[]> {
    const inner = scopes[scopes.length - 1]
    // A scope that has ended: the read will say so.
    if (inner === undefined) return [...(await read())]
    const known = this.#find(scopes, inner, key) ?? this.#keep(inner, key, read)
    return copyOf(await known.rows) as Row[]
  }

  clear(): void {
    if (this.#byScope.size > 0) this.#byScope = new Map()
  }

  #find(scopes: readonly object[], inner: object, key: string): Remembered | undefined {
    for (const scope of scopes) {
      const found = this.#byScope.get(scope)?.get(key)
      if (found !== undefined && (found.isThere || scope === inner)) return found
    }
    return undefined
  }

  #keep(scope: object, key: string, read: () => Promise<readonly unknown[]>): Remembered {
    const remembered: Remembered = { rows: read(), isThere: false }
    const entries = this.#byScope.get(scope) ?? new Map<string, Remembered>()
    this.#byScope.set(scope, entries.set(key, remembered))
    remembered.rows.then(
      () => {
        remembered.isThere = true
      },
      // The next one who asks shall try again.
      () => entries.get(key) === remembered && entries.delete(key),
    )
    return remembered
  }
}

/** The name of a statement with these values, as pg sends them. */
export function keyOf(text: string, values: readonly unknown[]): string {
  return JSON.stringify([text, ...values.map((value) => (Buffer.isBuffer(value) ? [value.toString('base64')] : value))])
}

// Rows are their asker's own, to change as he likes. Of what a type parser has made, only he who made it knows a copy.
function copyOf(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(copyOf)
  if (value instanceof Date) return new Date(value)
  if (Buffer.isBuffer(value)) return Buffer.from(value)
  if (typeof value !== 'object' || value === null) return value
  const prototype: unknown = Object.getPrototypeOf(value)
  if (prototype !== Object.prototype && prototype !== null) return value
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, copyOf(part)]))
}
