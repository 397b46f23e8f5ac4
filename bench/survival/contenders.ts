export type ContenderName = 'ours' | 'ours-on-response' | 'fastify-postgres' | 'kysely' | 'pg'

interface Entry {
  readonly title: string
  /** A file in contenders/, without its ending. */
  readonly file: string
  readonly options?: Record<string, unknown>
  /** How it is used here. */
  readonly given: string
}

export const CONTENDERS: Record<ContenderName, Entry> = {
  ours: {
    title: '`fastify-request-db`',
    file: 'ours',
    given: '`request.db` in the handler; its options at their defaults.',
  },
  'ours-on-response': {
    title: "with `commitOn: 'onResponse'`",
    file: 'ours',
    options: { commitOn: 'onResponse' },
    given: 'the same, with COMMIT after the answer.',
  },
  'fastify-postgres': {
    title: '`@fastify/postgres`',
    file: 'fastify-postgres',
    given:
      "the route option `pg: { transact: true }` with `request.pg`, and `app.pg.pool.on('error', …)`, without which a backend that is killed while it is idle ends the process.",
  },
  kysely: {
    title: 'Kysely',
    file: 'kysely',
    given:
      "`db.transaction().execute(…)` around the handler's work, over a `pg.Pool` with `pool.on('error', …)`; for streams `db.startTransaction()` in the generator.",
  },
  pg: {
    title: '`pg` by hand',
    file: 'pg',
    given:
      "`pool.connect()`, BEGIN, `try` with COMMIT, `catch` with ROLLBACK, `finally` with `release`, which destroys the connection if ROLLBACK failed; `pool.on('error', …)`; for streams the same in the generator.",
  },
}
