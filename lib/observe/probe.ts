import pg from 'pg'
import type { BackendView, ServerView } from './facts.ts'

const QUERY = `
  with recursive wanted(pid) as (
    select unnest($1::int[])
    union
    select unnest(pg_blocking_pids(pid)) from wanted
  )
  select a.pid, coalesce(a.state, '') as "state", coalesce(a.application_name, '') as "applicationName",
    coalesce(a.usename, '') as "userName", left(coalesce(a.query, ''), 500) as "query",
    greatest(0, extract(epoch from clock_timestamp() - a.state_change) * 1000)::float8 as "stateMillis",
    coalesce(a.wait_event_type = 'Lock', false) as "isWaitingForLock",
    pg_blocking_pids(a.pid) as "blockedBy"
  from wanted join pg_stat_activity a using (pid)`

/** Asks the server what it sees, over a connection outside of the pool, which has none to spare just then. */
export class ServerProbe {
  readonly #config: pg.ClientConfig
  readonly #withinMillis: number
  #client: pg.Client | undefined

  constructor(config: pg.ClientConfig, withinMillis: number) {
    this.#config = config
    this.#withinMillis = withinMillis
  }

  /** Looks at these backends and at whoever blocks them. Never throws. */
  async look(pids: readonly number[]): Promise<ServerView> {
    const timeout = new Error(`No answer within ${this.#withinMillis} ms`)
    let timer: NodeJS.Timeout | undefined
    try {
      const client = new pg.Client({ ...this.#config, connectionTimeoutMillis: 0 })
      this.#client = client
      // What goes wrong is told by the promises below; pg may say it once more.
      client.on('error', () => {})
      const late = new Promise<never>((_, reject) => {
        timer = setTimeout(reject, this.#withinMillis, timeout)
      })
      const asked = client.connect().then(() => client.query<BackendView>(QUERY, [pids]))
      asked.catch(() => {})
      const { rows } = await Promise.race([asked, late])
      client.end().catch(() => {})
      return { backends: rows, error: undefined }
    } catch (error) {
      this.end()
      return { backends: [], error: error as Error }
    } finally {
      clearTimeout(timer)
    }
  }

  /** Gives up what is under way. */
  end(): void {
    const { connection } = (this.#client ?? {}) as { connection?: { stream: { destroy(): void } } }
    // No goodbye: nobody may be there to read it.
    connection?.stream.destroy()
    this.#client = undefined
  }
}
