import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import type { CommitOn, RequestDbOptions, Session } from '../../lib/index.ts'
import type { Totals } from '../../lib/observe/snapshot.ts'
import { buildApp } from './app.ts'
import { type CapturedLog, captureLog } from './captured-log.ts'
import type { Database } from './database.ts'
import { isSoWithin } from './eventually.ts'
import { type Gate, gate } from './gate.ts'
import { openHttp } from './http-client.ts'
import { openHttp2 } from './http2-client.ts'
import { MODES } from './modes.ts'
import { add, notesIn } from './notebook.ts'
import { nothingIsLeft, watchedApps } from './nothing-left.ts'
import type { Handler } from './one-route.ts'
import { type PostgresProxy, startProxy } from './proxy.ts'
import { type Test, test } from './test.ts'

/** How a scenario must have ended. */
export interface Ending {
  /** What each of its clients got, in order: a status, with the code of an error (`503 POOL_TIMEOUT`), or none. */
  readonly answers: readonly (Answer | 'none')[]
  readonly expected: readonly (string | number)[]
  /** The notes in the table. */
  readonly rows: readonly string[]
  /** The connection that was open before: in use again, or replaced. Left out: either. */
  readonly connection?: 'reused' | 'gone' | undefined
  /** What becomes of the next request. Of what is closed, nothing may be left. Default 'served'. */
  readonly next?: 'served' | 'unavailable' | 'closed'
  /** What must have counted since the scenario began, of `snapshot().totals`. */
  readonly totals?: Partial<Totals>
}

export interface Answer {
  readonly status: number
  readonly code: string | undefined
  readonly body: string
}

export interface SceneOptions extends RequestDbOptions {
  readonly fastify?: FastifyServerOptions & { http2?: true }
  /** `POST /`. */
  readonly handler?: Handler
  readonly routes?: (app: FastifyInstance) => unknown
  /** Whether a connection is open before the scenario begins. Default true. */
  readonly isOpen?: boolean
}

/** A handler that only writes this. */
export const writes = (note: string) => async (db: Session) => {
  await add(db, note)
  return 'written'
}

/** How a client speaks that comes and goes. */
export const PROTOCOLS = ['HTTP/1.1', 'HTTP/1.1 pipelined', 'HTTP/2'] as const
export type Protocol = (typeof PROTOCOLS)[number]

/** A client of a real socket. */
export interface Guest {
  /** Sends, and does not wait. */
  send(method: string, path: string, body?: unknown): void
  /** The answer to what was sent last; `'none'` where the connection ends before it is whole. */
  answer(): Promise<Answer | 'none'>
  leave(): void
}

/** One app behind a proxy in front of a real server, and what can happen to it. */
export class Scene {
  readonly log: CapturedLog = captureLog()
  /** For the handler to say that it is there. */
  readonly reached: Gate<number> = gate()
  /** For the handler to wait for. */
  readonly goOn: Gate = gate()
  #app: FastifyInstance | undefined
  #pid: number | undefined
  readonly t: Test
  readonly database: Database
  readonly proxy: PostgresProxy
  readonly commitOn: CommitOn

  constructor(t: Test, database: Database, proxy: PostgresProxy, commitOn: CommitOn) {
    this.t = t
    this.database = database
    this.proxy = proxy
    this.commitOn = commitOn
    t.teardown(() => this.goOn.open())
  }

  get app(): FastifyInstance {
    if (!this.#app) throw new Error('no app was opened')
    return this.#app
  }

  /** Its backends in pg_stat_activity. */
  readonly backends = () => this.database.backends(this.application)
  /** Its application_name. */
  application = ''
  #totalsBefore: Totals | undefined

  /** The backend of the connection that was open before. */
  get pid(): number {
    return this.#pid ?? 0
  }

  async open(options: SceneOptions = {}): Promise<FastifyInstance> {
    const { fastify, handler, routes, isOpen = true, ...rest } = options
    const target = rest.connection ? {} : { connectionString: this.proxy.connectionString }
    const all = { commitOn: this.commitOn, ...target, ...rest }
    const app = await buildApp(
      this.t,
      this.database,
      all,
      async (app) => {
        app.get('/is-served', () => 'yes')
        app.get('/ordinary', async ({ db }) => db.selectFrom('notes').selectAll().execute())
        if (handler) app.post('/', async (request, reply) => handler(request.db, request, reply))
        await routes?.(app)
      },
      { logger: this.log.options, ...fastify },
    )
    this.#app = app
    this.application = watchedApps().at(-1)!.application
    if (isOpen) {
      await app.db.ping()
      this.#pid = (await this.backends())[0]!.pid
      this.proxy.clear()
    }
    this.#totalsBefore = app.db.snapshot().totals
    return app
  }

  /** `POST /`, or another, without a socket. */
  async post(url = '/', body?: object): Promise<Answer> {
    const response = await this.app.inject({ method: 'POST', url, ...(body && { payload: body }) })
    return toAnswer(response.statusCode, response.body)
  }

  async guest(protocol: Protocol = 'HTTP/1.1'): Promise<Guest> {
    return protocol === 'HTTP/2' ? this.#http2() : this.#http1(protocol === 'HTTP/1.1 pipelined')
  }

  async #http1(pipelines: boolean): Promise<Guest> {
    const client = await openHttp(this.t, this.app)
    let isFirst = true
    return {
      send: (method, path, body) => {
        if (isFirst && pipelines) client.send('GET', '/is-served')
        isFirst = false
        client.send(method, path, { body })
      },
      answer: async () => {
        if (pipelines) await client.response()
        return client.response().then(
          ({ status, body }) => toAnswer(status, body),
          () => 'none' as const,
        )
      },
      leave: () => client.destroy(),
    }
  }

  async #http2(): Promise<Guest> {
    const client = await openHttp2(this.t, this.app)
    let last: ReturnType<typeof client.send> | undefined
    return {
      send: (method, path, body) => {
        last = client.send(method, path, { body })
      },
      answer: async () =>
        last!.response().then(
          ({ status, body }) => toAnswer(status, body),
          () => 'none' as const,
        ),
      leave: () => last?.reset(),
    }
  }

  /** The four things that are looked at: the answer, the rows, pg_stat_activity, the counters. */
  async endsIn({ answers, expected, rows, connection, next = 'served', totals = {} }: Ending): Promise<void> {
    const { t, database } = this
    const told = answers.map((answer) =>
      answer === 'none' ? 'none' : answer.code === undefined ? answer.status : `${answer.status} ${answer.code}`,
    )
    t.strictSame(told, expected, 'what the clients were told')
    await nothingIsLeft(t)
    t.strictSame(await notesIn(database), rows, 'what is in the table')
    if (!this.#app) return
    // DISCARD ALL may still be under way.
    await isSoWithin(5000, async () => this.app.db.snapshot().open === this.app.db.snapshot().idle)
    this.#assertCounts(totals)
    this.proxy.restore()
    if (next === 'closed') {
      t.equal(this.app.db.snapshot().open, 0, 'the pool is empty')
      t.ok(await isSoWithin(5000, async () => (await this.backends()).length === 0), 'no backend is left')
      return
    }
    const after = await this.app.inject(`/ordinary`)
    t.equal(after.statusCode, next === 'served' ? 200 : 503, `the next request is ${next}`)
    if (connection === undefined) return
    const has = async () => (await this.backends()).some(({ pid }) => pid === this.pid)
    if (connection === 'reused') t.ok(await has(), 'the connection is used again')
    else t.ok(await isSoWithin(5000, async () => !(await has())), 'the connection is gone')
  }

  #assertCounts(totals: Partial<Totals>): void {
    const snapshot = this.app.db.snapshot()
    const { opened, closed, recycled, invalidated } = snapshot.totals
    this.t.equal(snapshot.open, opened - closed - recycled - invalidated, 'every connection is accounted for')
    this.t.equal(snapshot.open, snapshot.idle, 'all that are open are idle')
    this.t.ok(snapshot.open <= snapshot.size, 'the overflow is closed')
    const before = this.#totalsBefore as Totals
    const counted = Object.keys(totals).map((name) => [
      name,
      snapshot.totals[name as keyof Totals] - before[name as keyof Totals],
    ])
    this.t.strictSame(Object.fromEntries(counted), totals, 'what was counted')
  }
}

function toAnswer(status: number, body: string): Answer {
  const code = /"code":"(?:FST_REQUEST_DB_)?(\w+)"/.exec(body)?.[1]
  return { status, code, body }
}

/**
 * A test in both commit modes, or in those given, each time on an empty table `notes`: what `play` says must be so is
 * looked at when all has come to rest.
 */
export function scenario(
  database: Database,
  title: string,
  play: (scene: Scene) => Promise<Ending>,
  modes: readonly CommitOn[] = MODES,
): void {
  for (const commitOn of modes) {
    void test(`${title} (${commitOn})`, async (t) => {
      await database.query('delete from notes')
      const scene = new Scene(t, database, await startProxy(t, database.connectionString), commitOn)
      await scene.endsIn(await play(scene))
    })
  }
}
