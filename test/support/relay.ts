import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { Response } from 'light-my-request'
import type { CommitOn, RequestDbOptions, Session } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import { type CapturedLog, captureLog } from './captured-log.ts'
import type { Database } from './database.ts'
import { eventually } from './eventually.ts'
import { type Gate, gate } from './gate.ts'
import { add } from './notebook.ts'
import { type PostgresProxy, startProxy } from './proxy.ts'
import { NOTES } from './schema.ts'
import { type Test, test } from './test.ts'

const LOCK = 4711

/** `notes`; the COMMIT of one that is called `slow …` waits for `freeze`, that of one called `doomed …` fails with 23514. */
export const RELAY = `${NOTES};
  create function at_commit() returns trigger language plpgsql as $$
  begin
    if new.note like 'slow%' then perform pg_advisory_xact_lock_shared(${LOCK}); end if;
    if new.note like 'doomed%' then raise exception 'doomed' using errcode = '23514'; end if;
    return null;
  end $$;
  create constraint trigger at_commit after insert on notes deferrable initially deferred
    for each row execute function at_commit()`

/** Has COMMITs of slow notes wait in the server, until `thaw`. */
export async function freeze(
  t: Test,
  database: Database,
): Promise<{ frozen(): Promise<number>; thaw(): Promise<void> }> {
  const client = await database.client()
  t.teardown(() => client.end())
  await client.query('select pg_advisory_lock($1)', [LOCK])
  return {
    /** Resolves with the backend whose COMMIT waits. */
    frozen: async () => {
      let pid = 0
      await eventually(async () => {
        const waits = (await database.backends()).find(({ waitEvent }) => waitEvent === 'advisory')
        pid = waits?.pid ?? 0
        return pid !== 0
      })
      return pid
    },
    thaw: async () => void (await client.query('select pg_advisory_unlock($1)', [LOCK])),
  }
}

/** A way to use a session first, and what leaves with it in the first flight. */
export interface Style {
  readonly name: string
  readonly leaves: readonly string[]
  /** COMMIT is in the first flight. Under `onResponse` the answer has left before. */
  readonly isWhole?: boolean
  /** How often it writes its note. */
  readonly rows: number
  readonly run: (db: Session, note: string) => unknown
}

const BEGIN = 'BEGIN'
const INSERT = 'INSERT'
const insert = (db: Session, note: string) => db.insertInto('notes').values({ note })

/** All the ways there are. Each is a route: POST /name/:note. */
export const STYLES: readonly Style[] = [
  { name: 'one', leaves: [BEGIN, INSERT], rows: 1, run: add },
  {
    name: 'added',
    leaves: [BEGIN, INSERT, INSERT, 'COMMIT'],
    isWhole: true,
    rows: 2,
    run: (db, note) => {
      db.add(insert(db, note))
      db.add(insert(db, note))
    },
  },
  {
    name: 'added-behind',
    leaves: [BEGIN, INSERT],
    rows: 2,
    run: async (db, note) => {
      await add(db, note)
      db.add(insert(db, note))
    },
  },
  {
    name: 'flushed',
    leaves: [BEGIN, INSERT],
    rows: 1,
    run: async (db, note) => {
      db.add(insert(db, note))
      await db.flush()
    },
  },
  {
    name: 'parallel',
    leaves: [BEGIN, INSERT, INSERT, INSERT],
    rows: 3,
    run: (db, note) => Promise.all([add(db, note), add(db, note), add(db, note)]),
  },
  {
    name: 'unawaited',
    leaves: [BEGIN, INSERT],
    rows: 1,
    run: (db, note) => {
      void add(db, note).catch(() => {})
    },
  },
  {
    name: 'raw',
    leaves: [BEGIN],
    rows: 1,
    run: (db, note) => db.withClient((client) => client.query('insert into notes (note) values ($1)', [note])),
  },
  {
    name: 'begun',
    leaves: [BEGIN],
    rows: 1,
    run: async (db, note) => {
      await db.begin()
      await add(db, note)
    },
  },
  {
    name: 'nested',
    leaves: [BEGIN, 'SAVEPOINT'],
    rows: 1,
    run: (db, note) => db.transaction().execute((trx) => trx.insertInto('notes').values({ note }).execute()),
  },
  {
    name: 'streamed',
    leaves: [BEGIN, INSERT],
    rows: 1,
    run: (db, note) => {
      const rows = db.insertInto('notes').values({ note }).returning('note').stream()
      return Readable.from(
        (async function* () {
          for await (const row of rows) yield row.note
        })(),
      )
    },
  },
  {
    name: 'settled',
    leaves: [BEGIN, 'SELECT', INSERT],
    rows: 1,
    run: (db) => sql`insert into notes (note) values (current_setting('app.tenant'))`.execute(db),
  },
  { name: 'read', leaves: [BEGIN, 'SELECT'], rows: 0, run: (db) => db.selectFrom('notes').select('id').execute() },
]

/** A test for each style on an empty table, in one commit mode by turns: `added` under `onSend`. */
export function forEachStyle(
  database: Database,
  name: (style: string) => string,
  body: (t: Test, style: Style, commitOn: CommitOn) => Promise<void>,
): void {
  for (const [at, style] of STYLES.entries()) {
    const commitOn = at % 2 === 1 ? 'onSend' : 'onResponse'
    void test(`${name(style.name)} (${commitOn})`, async (t) => {
      await database.query('delete from notes')
      await body(t, style, commitOn)
    })
  }
}

/** The rows it leaves when it is committed. */
export const notesOf = ({ rows }: Style, note: string): string[] => Array.from({ length: rows }, () => note)

/** A request that has written its note and has its connection, until it is let go. */
export interface Held {
  readonly answer: Promise<Response>
  letGo(): void
}

/** An app behind a recording proxy, on whose connections requests follow each other. */
export interface Relay {
  readonly app: FastifyInstance
  readonly proxy: PostgresProxy
  readonly log: CapturedLog
  post(path: string): Promise<Response>
  /**
   * Sends POST /hold/:note; has its connection when this resolves. It throws Error('mine') if its note is `throws …`, and
   * commits by hand with a write that fails if it is `failing …`.
   */
  hold(note: string): Promise<Held>
  /** Sends it; it waits in the queue when this resolves. */
  enqueue(path: string): Promise<{ answer: Promise<Response> }>
  /** How many requests were closed before their answer. */
  gone(): number
}

/** `settings` are those of the style `settled`; the pool has one connection unless the options say otherwise. */
export async function buildRelay(
  t: Test,
  database: Database,
  { pool, ...options }: RequestDbOptions = {},
  more: (app: FastifyInstance) => unknown = () => {},
): Promise<Relay> {
  const proxy = await startProxy(t, database.connectionString)
  const log = captureLog()
  const holds = new Map<string, { inHand: Gate; goOn: Gate }>()
  let gone = 0
  const all: RequestDbOptions = {
    connectionString: proxy.connectionString,
    pool: { size: 1, ...pool },
    settings: ({ params, routeOptions }) => {
      const isSettled = routeOptions.url === '/settled/:note'
      return isSettled ? { 'app.tenant': (params as { note: string }).note } : {}
    },
    ...options,
  }
  const routes = (app: FastifyInstance) => {
    app.addHook('onRequest', async (_request, { raw }) => {
      raw.once('close', () => {
        if (!raw.writableEnded) gone++
      })
    })
    for (const { name, run } of STYLES) {
      const config = name === 'read' ? { db: { readOnly: true } } : {}
      app.post<{ Params: { note: string } }>(`/${name}/:note`, { config }, async ({ db, params }, reply) => {
        const result = await run(db, params.note)
        return result instanceof Readable ? reply.send(result) : 'kept'
      })
    }
    app.post<{ Params: { note: string } }>('/failing/:note', async ({ db, params: { note } }) => {
      db.add(insert(db, note))
      db.add(insert(db, null as unknown as string))
      await db.commit()
    })
    app.post<{ Params: { note: string } }>('/hold/:note', async ({ db, params: { note } }) => {
      await add(db, note)
      const hold = holds.get(note)
      hold?.inHand.open()
      await hold?.goOn.opened
      if (note.startsWith('throws')) throw new Error('mine')
      // Leaves a failed transaction, as COMMIT is skipped with it.
      if (note.startsWith('failing')) {
        db.add(insert(db, null as unknown as string))
        await db.commit()
      }
      return 'kept'
    })
    return more(app)
  }
  const app = await buildApp(t, database, all, routes, { logger: log.options })
  const post = (path: string) => app.inject({ method: 'POST', url: encodeURI(path) })
  const enqueue = async (path: string) => {
    const { waiting } = app.db.snapshot()
    const answer = post(path)
    await eventually(() => app.db.snapshot().waiting > waiting)
    return { answer }
  }
  const hold = async (note: string) => {
    const gates = { inHand: gate(), goOn: gate() }
    holds.set(note, gates)
    const answer = post(`/hold/${note}`)
    await gates.inHand.opened
    return { answer, letGo: () => gates.goOn.open() }
  }
  return { app, proxy, log, post, hold, enqueue, gone: () => gone }
}

/** Resolves when one connection has been handed over and the proxy has seen `flights` in all, those behind included. */
export async function handedOver({ app, proxy }: Relay, flights = 3): Promise<void> {
  await eventually(() => app.db.snapshot().totals.handOvers > 0 && proxy.flights.length >= flights, {
    describe: () => `no hand-over: ${JSON.stringify({ flights: proxy.statements(), snapshot: app.db.snapshot() })}`,
  })
}
