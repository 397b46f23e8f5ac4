import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { ITEMS } from './items.ts'
import type { Subject } from './questions.ts'

/** Settings of the benchmark's PostgreSQL. What is not here is PostgreSQL's default: fsync and synchronous_commit are on. */
export const POSTGRES_FLAGS = [
  'max_connections=400',
  'shared_buffers=256MB',
  // Work that would fall into one contender's turn and not into another's.
  'autovacuum=off',
  'checkpoint_timeout=1h',
  'max_wal_size=2GB',
]

const SCHEMA = `
  drop table if exists items, counts, entries;
  create table items (id integer primary key, name text not null, price integer not null);
  insert into items select id, 'item ' || id, (id * 7919) % 10000 from generate_series(1, ${ITEMS}) id;
  -- With room on each page, so that an updated row stays where it is in the index.
  create table counts (id integer primary key, count integer not null) with (fillfactor = 50);
  insert into counts select id, 0 from generate_series(1, ${ITEMS}) id;
  create table entries (item integer not null, note text not null);`

const WRITTEN = {
  insert: `select count(*)::float8 as rows, coalesce(sum(item), 0)::float8 as sum
    from entries where note = 'a note on item ' || item`,
  update: 'select sum(count)::float8 as rows, sum(count::bigint * id)::float8 as sum from counts',
}
const OPEN = `select count(*)::int as open from pg_stat_activity where state like 'idle in transaction%'`

/** Commits may come behind the answers, and are waited for this long. */
const SETTLED_WITHIN_MILLIS = 5000

/** Writes: how many, and of which items, their numbers added up. */
interface Written {
  readonly rows: number
  readonly sum: number
}

/** What a contender claims of a load. */
export interface Claim {
  readonly subject: Subject
  readonly asked: number
  /** Requests that were answered rightly, and the sum of their items. */
  readonly right: number
  readonly sum: number
}

/** The benchmark's own eye on the database. */
export class Witness {
  readonly #client: pg.Client
  #before: Written = { rows: 0, sum: 0 }

  constructor(connectionString: string) {
    this.#client = new pg.Client({ connectionString })
  }

  async open(): Promise<void> {
    await this.#client.connect()
    await this.#client.query(SCHEMA)
    await this.#client.query('vacuum analyze')
    await this.#client.query('checkpoint')
  }

  async close(): Promise<void> {
    await this.#client.end()
  }

  async version(): Promise<string> {
    const { rows } = await this.#client.query<{ server_version: string }>('show server_version')
    return rows[0]!.server_version
  }

  /** Call it before each load. */
  async remember(subject: Subject): Promise<void> {
    if (subject === 'insert') await this.#client.query('truncate entries')
    if (subject === 'insert' || subject === 'update') this.#before = await this.#written(subject)
  }

  /** What the database contradicts, when all requests of the load have ended. */
  async complaint(claim: Claim): Promise<string | undefined> {
    const deadline = performance.now() + SETTLED_WITHIN_MILLIS
    for (;;) {
      const complaint = (await this.#wrongRows(claim)) ?? (await this.#leftOpen())
      if (!complaint || performance.now() > deadline) return complaint
      await sleep(20)
    }
  }

  async #wrongRows({ subject, asked, right, sum }: Claim): Promise<string | undefined> {
    if (subject !== 'insert' && subject !== 'update') return undefined
    const after = await this.#written(subject)
    const rows = after.rows - this.#before.rows
    // Of requests that got no right answer nobody knows whether they were committed.
    const unknown = asked - right
    const asClaimed = unknown === 0 ? rows === right && after.sum - this.#before.sum === sum : rows >= right
    if (asClaimed && rows <= right + unknown) return undefined
    return `acknowledged ${right} rows, of which ${rows} are in the database (${unknown} requests were not acknowledged)`
  }

  async #leftOpen(): Promise<string | undefined> {
    const { rows } = await this.#client.query<{ open: number }>(OPEN)
    return rows[0]!.open === 0 ? undefined : `left ${rows[0]!.open} transactions open`
  }

  async #written(subject: 'insert' | 'update'): Promise<Written> {
    const { rows } = await this.#client.query<Written>(WRITTEN[subject])
    return rows[0]!
  }
}
