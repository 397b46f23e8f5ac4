/** A statement under a name on one connection. */
export interface Prepared {
  readonly name: string
  /** The server has parsed it. Until then only `parsedBy`, under one Sync with its Parse, may use it. */
  isReady: boolean
  /** Its Parse is on the wire. */
  isSent: boolean
  readonly parsedBy: object
  lastUse: number
  /** What its rows look like, kept for its user. */
  shape: unknown
}

/** The named statements of one connection. */
export interface PreparedStatements {
  /** The statement to run `text` with; undefined is the unnamed one. What is new has to be parsed first. */
  use(text: string, user: object): Prepared | undefined
  /** Names to close before anything else is sent. */
  takeClosing(): readonly string[]
  /** The server no longer has it, or it is not certain what the server has under its name. */
  forget(prepared: Prepared): void
  /** No connection can run this text under its old name any more. */
  dropEverywhere(text: string): void
  /** Something beyond our sight, such as DISCARD ALL, may have happened to all of them. */
  forgetAll(): void
  /** DISCARD ALL is about to be sent. */
  dropAll(): void
  /** Its connection is gone. */
  end(): void
}

/** Which texts get a name. Shared by the connections of a pool. */
export interface StatementNames {
  /** For a connection just opened. */
  open(): PreparedStatements
}

const NOTHING: readonly string[] = []

/** Prepared statements switched off: every statement is the unnamed one. */
export const UNNAMED: StatementNames & PreparedStatements = {
  open: () => UNNAMED,
  use: () => undefined,
  takeClosing: () => NOTHING,
  forget: () => {},
  dropEverywhere: () => {},
  forgetAll: () => {},
  dropAll: () => {},
  end: () => {},
}

// A text is named when it comes for the fourth time: an `in (…)` list that is never the same does not get that far.
const USES_BEFORE_NAME = 3
// How many texts are counted at a time, as a multiple of those that can have a name.
const COUNTED = 4

/** Names texts that come again and again, the same on all connections; at most `cacheSize` on each. */
export class NamedStatements implements StatementNames {
  readonly #cacheSize: number
  readonly #uses = new Map<string, number>()
  readonly #names = new Map<string, Name>()
  readonly #connections = new Set<NamesOfConnection>()
  #count = 0
  /** Counts uses: what was used last has the highest. */
  clock = 0

  constructor(cacheSize: number) {
    this.#cacheSize = cacheSize
  }

  open(): PreparedStatements {
    const opened = new NamesOfConnection(this, this.#cacheSize, () => this.#connections.delete(opened))
    this.#connections.add(opened)
    return opened
  }

  dropEverywhere(text: string): void {
    const old = this.#names.get(text)
    if (old === undefined) return
    // It has earned a name already: a new one, which no connection can take for the old.
    this.#names.set(text, this.#newName())
    for (const connection of this.#connections) connection.forgetName(old.name)
  }

  /** The name of `text`; undefined while it has not come often enough. */
  nameOf(text: string): string | undefined {
    const known = this.#names.get(text)
    if (known !== undefined) {
      known.lastUse = ++this.clock
      return known.name
    }
    const uses = (this.#uses.get(text) ?? 0) + 1
    // Behind the others, as one that came just now.
    this.#uses.delete(text)
    if (uses <= USES_BEFORE_NAME) {
      this.#uses.set(text, uses)
      const [oldest] = this.#uses.keys()
      if (this.#uses.size > COUNTED * this.#cacheSize && oldest !== undefined) this.#uses.delete(oldest)
      return undefined
    }
    if (this.#names.size >= this.#cacheSize) this.#names.delete(leastRecent(this.#names) ?? '')
    const given = this.#newName()
    this.#names.set(text, given)
    return given.name
  }

  #newName(): Name {
    return { name: `request_db_${++this.#count}`, lastUse: ++this.clock }
  }
}

class NamesOfConnection implements PreparedStatements {
  readonly #names: NamedStatements
  readonly #cacheSize: number
  readonly #prepared = new Map<string, Prepared>()
  #closing: string[] = []
  readonly end: () => void

  constructor(names: NamedStatements, cacheSize: number, end: () => void) {
    this.#names = names
    this.#cacheSize = cacheSize
    this.end = end
  }

  use(text: string, user: object): Prepared | undefined {
    const name = this.#names.nameOf(text)
    if (name === undefined) return undefined
    const known = this.#prepared.get(name)
    if (known !== undefined) {
      // Were its Parse refused, who comes behind another Sync would be told of an unknown name.
      if (!known.isReady && known.parsedBy !== user) return undefined
      known.lastUse = ++this.#names.clock
      return known
    }
    const prepared: Prepared = {
      name,
      isReady: false,
      isSent: false,
      parsedBy: user,
      lastUse: ++this.#names.clock,
      shape: undefined,
    }
    this.#prepared.set(name, prepared)
    this.#makeRoom(user)
    return prepared
  }

  takeClosing(): readonly string[] {
    if (this.#closing.length === 0) return NOTHING
    const closing = this.#closing
    this.#closing = []
    return closing
  }

  forget({ name }: Prepared): void {
    this.forgetName(name)
  }

  dropEverywhere(text: string): void {
    this.#names.dropEverywhere(text)
  }

  forgetName(name: string): void {
    if (this.#prepared.delete(name)) this.#closing.push(name)
  }

  forgetAll(): void {
    for (const name of [...this.#prepared.keys()]) this.forgetName(name)
  }

  dropAll(): void {
    this.#prepared.clear()
    this.#closing = []
  }

  // What is about to be sent must still be there when it arrives.
  #makeRoom(user: object): void {
    if (this.#prepared.size <= this.#cacheSize) return
    const oldest = leastRecent(this.#prepared, ({ isReady, parsedBy }) => isReady && parsedBy !== user)
    if (oldest !== undefined) this.forgetName(oldest)
  }
}

interface Name {
  readonly name: string
  lastUse: number
}

function leastRecent<T extends { lastUse: number }>(
  map: Map<string, T>,
  isFit: (value: T) => boolean = () => true,
): string | undefined {
  let found: string | undefined
  let lastUse = Number.POSITIVE_INFINITY
  for (const [key, value] of map) {
    if (value.lastUse >= lastUse || !isFit(value)) continue
    found = key
    lastUse = value.lastUse
  }
  return found
}
