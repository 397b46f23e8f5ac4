import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'

/** Who ran a statement is told by its `application_name`: rows and backends of one run are its own. */
export const SCHEMA = `
  drop table if exists notes, numbers;
  create table notes (
    id integer primary key generated always as identity,
    run text not null default current_setting('application_name'),
    note text not null
  );
  create table numbers as select n, repeat('x', 1000) as filler from generate_series(1, 20000) n;
  create or replace function refuse() returns trigger language plpgsql as $$
  begin
    raise exception 'refused at COMMIT' using errcode = '23514';
  end $$;
  create constraint trigger refuse_at_commit after insert on notes deferrable initially deferred
    for each row when (new.note like 'doomed%') execute function refuse()`

export interface Backend {
  readonly pid: number
  readonly state: string
  readonly query: string
}

const BACKENDS = `select pid, state, query from pg_stat_activity
  where datname = current_database() and application_name = $1 and backend_type = 'client backend'`

/** What the database has of one run, seen by somebody else. */
export class Witness {
  readonly #client: pg.Client
  readonly #run: string

  constructor(connectionString: string, run: string) {
    this.#client = new pg.Client({ connectionString, application_name: 'witness' })
    this.#run = run
  }

  async open(): Promise<void> {
    await this.#client.connect()
  }

  async close(): Promise<void> {
    await this.terminate()
    await this.#client.end()
  }

  async write(note: string): Promise<void> {
    await this.#client.query('insert into notes (run, note) values ($1, $2)', [this.#run, note])
  }

  async notes(): Promise<string[]> {
    const text = 'select note from notes where run = $1 order by id'
    const { rows } = await this.#client.query<{ note: string }>(text, [this.#run])
    return rows.map(({ note }) => note)
  }

  /** Waits for a backend that runs such a statement. */
  async running(statement: string): Promise<void> {
    await until(5000, async () =>
      (await this.#backends()).some(({ state, query }) => state === 'active' && query.includes(statement)),
    )
  }

  /** Ends all backends of the run, as a restart of the server does. */
  async terminate(): Promise<void> {
    await this.#client.query(`select pg_terminate_backend(pid, 1000) from (${BACKENDS}) backends`, [this.#run])
  }

  /** Backends that still work, or have a transaction open, after `withinMillis`. */
  async left(withinMillis: number): Promise<readonly Backend[]> {
    let left: readonly Backend[] = []
    await until(withinMillis, async () => {
      left = (await this.#backends()).filter(({ state }) => state !== 'idle')
      return left.length === 0
    })
    return left
  }

  /** Whether nobody holds a lock on the row of a note any more, within `withinMillis`. */
  lockIsFree(note: string, withinMillis: number): Promise<boolean> {
    const text = 'select id from notes where run = $1 and note = $2 for update skip locked'
    return until(withinMillis, async () => (await this.#client.query(text, [this.#run, note])).rowCount === 1)
  }

  async #backends(): Promise<readonly Backend[]> {
    return (await this.#client.query<Backend>(BACKENDS, [this.#run])).rows
  }
}

async function until(withinMillis: number, holds: () => Promise<boolean>): Promise<boolean> {
  const deadline = performance.now() + withinMillis
  while (!(await holds())) {
    if (performance.now() > deadline) return false
    await sleep(20)
  }
  return true
}
