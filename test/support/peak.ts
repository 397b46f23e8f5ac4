import type { Test } from 'tap'
import type { Database } from './database.ts'

/** Counts an application's backends in pg_stat_activity again and again, until `stop()` tells the most there ever were. */
export async function watchPeak(
  t: Test,
  database: Database,
  application: string,
): Promise<{ stop(): Promise<number> }> {
  const client = await database.client()
  let peak = 0
  let watching = true
  const watch = async () => {
    while (watching) {
      const { rows } = await client.query(
        'select count(*)::int as n from pg_stat_activity where datname = current_database() and application_name = $1',
        [application],
      )
      peak = Math.max(peak, rows[0].n)
    }
  }
  const watched = watch()
  t.teardown(() => {
    watching = false
  })
  return {
    stop: async () => {
      watching = false
      await watched
      return peak
    },
  }
}
