import { Readable } from 'node:stream'
import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { CommitOn, RequestDbOptions } from '../../../lib/index.ts'
import { buildApp } from '../app.ts'
import type { Database } from '../database.ts'
import { type PostgresProxy, startProxy } from '../proxy.ts'
import type { Test } from '../test.ts'
import type { Fault, Scenario } from './program.ts'
import { type Fate, isUnknown, Unit } from './unit.ts'

/** The table the programs write to: each row with the transaction that wrote it. */
export const DEEDS = `create table deeds (row text primary key, tx xid8 not null default pg_current_xact_id())`

// Without them, a program would wait for ever on a connection that has fallen silent.
const DEADLINES = { settleTimeoutMillis: 500, maxSessionMillis: 1500 }

interface Answer {
  readonly status: number
  readonly code: string | undefined
}

/** An app on which programs run, behind a proxy that can cut its connections. */
export class Stage {
  readonly app: FastifyInstance
  readonly #proxy: PostgresProxy
  readonly #database: Database
  readonly #commitOn: CommitOn
  readonly #units = new Map<string, Unit>()
  // A COMMIT whose connection was cut can arrive after its rows were looked for: no name comes twice.
  static #count = 0

  static async open(t: Test, database: Database, commitOn: CommitOn, options: RequestDbOptions = {}): Promise<Stage> {
    const proxy = await startProxy(t, database.connectionString)
    const all = { connectionString: proxy.connectionString, commitOn, pool: { size: 2 }, ...DEADLINES, ...options }
    let stage: Stage | undefined
    const app = await buildApp(t, database, all, (app) => {
      app.get<{ Params: { id: string } }>('/:id', async ({ db, params }, reply) => {
        const unit = stage?.unit(params.id) as Unit
        await unit.run(db)
        const { end } = unit.program
        if (end === 'refuse') return reply.code(409).send('refused')
        if (end === 'nothing') return reply.code(204).send()
        if (end === 'late use')
          reply.then(
            () => void unit.useLate(db),
            () => {},
          )
        if (end !== 'stream') return 'ok'
        const rows = db.withTables<{ deeds: { row: string } }>().selectFrom('deeds').select('row').limit(3).stream()
        return Readable.from(rows, { objectMode: true }).map(({ row }: { row: string }) => `${row}\n`)
      })
    })
    stage = new Stage(app, proxy, database, commitOn)
    return stage
  }

  private constructor(app: FastifyInstance, proxy: PostgresProxy, database: Database, commitOn: CommitOn) {
    this.app = app
    this.#proxy = proxy
    this.#database = database
    this.#commitOn = commitOn
  }

  unit(id: string): Unit {
    return this.#units.get(id) as Unit
  }

  forget(): void {
    this.#proxy.forget()
  }

  /**
   * Runs all programs at once, with the faults. Returns what went against the rules. `isQuiet`: nothing else disturbs them,
   * such as a restart of the server.
   */
  async play({ programs, faults }: Scenario, isQuiet = true): Promise<string[]> {
    const isCalm = isQuiet && faults.every(({ kind }) => kind === 'none')
    // What broke in the scenario before may show only now: in `onResponse` nobody is told.
    if (isCalm) await Promise.allSettled(Array.from({ length: this.app.db.snapshot().size }, () => this.app.db.ping()))
    const run = ++Stage.#count
    const units = programs.map((program, index) => new Unit(`${run}.${index}`, program))
    const leavers = units.map(() => new AbortController())
    for (const unit of units) this.#units.set(unit.id, unit)
    const answers = units.map((unit, index) => this.#ask(unit, leavers[index] as AbortController))
    const done = Promise.all(answers)
    await Promise.all([done, ...faults.map((fault) => this.#strike(fault, leavers, done))])
    this.#proxy.disarm()
    this.#proxy.restore()
    const left = await this.#leftOpen()
    await Promise.all(units.map((unit) => unit.over()))
    const rows = await this.#rowsOf(run)
    const complaints = (await done).flatMap((answer, index) => this.#judge(units[index] as Unit, answer, rows, isCalm))
    for (const { id } of units) this.#units.delete(id)
    this.#proxy.clear()
    return [...complaints, ...left]
  }

  async #ask(unit: Unit, leaver: AbortController): Promise<Answer | undefined> {
    try {
      const { statusCode, body } = await this.app.inject({ url: `/${unit.id}`, signal: leaver.signal })
      const code = body.startsWith('{') ? (JSON.parse(body) as { code?: string }).code : undefined
      return { status: statusCode, code }
    } catch {
      return undefined
    }
  }

  async #strike(
    { kind, afterMillis, which }: Fault,
    leavers: AbortController[],
    done: Promise<unknown>,
  ): Promise<void> {
    await Promise.race([pause(afterMillis), done])
    if (kind === 'client leaves') leavers[which % leavers.length]?.abort()
    if (kind === 'cut a connection') this.#proxy.cut(which % 2 === 0 ? 'reset' : 'end', ({ closed }) => !closed)
    if (kind === 'lose the answer to a COMMIT') this.#proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'reset')
    if (kind === 'slow down') this.#proxy.delay(which)
    if (kind === 'go silent') this.#proxy.swallow()
    const { holders } = this.app.db.snapshot()
    const pid = holders[which % Math.max(1, holders.length)]?.pid
    if (pid === undefined) return
    if (kind === 'kill a backend') await this.#query('select pg_terminate_backend($1)', [pid])
    if (kind === 'cancel a statement') await this.#query('select pg_cancel_backend($1)', [pid])
  }

  // The server may be restarting.
  async #query(text: string, values: unknown[]): Promise<unknown[]> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await this.#database.query(text, values)
      } catch (error) {
        if (attempt === 200) throw error
        await pause(50)
      }
    }
  }

  async #rowsOf(run: number): Promise<Map<string, string>> {
    const rows = await this.#query('delete from deeds where row like $1 returning row, tx::text', [`${run}.%`])
    return new Map((rows as { row: string; tx: string }[]).map(({ row, tx }) => [row, tx]))
  }

  #judge(unit: Unit, answer: Answer | undefined, rows: Map<string, string>, isCalm: boolean): string[] {
    const complaints = [...unit.complaints]
    const expected = new Set<string>()
    for (const [index, segment] of unit.segments.entries()) {
      const fate = segment.fate === 'open' ? this.#fateBy(answer, unit, isCalm) : segment.fate
      const kept = segment.rows.filter((row) => rows.has(row))
      const what = `transaction ${index} of ${unit.id} (${this.#commitOn}, ${fate}, answer ${answer?.status} ${answer?.code ?? ''})`
      if (
        segment.fate === 'gone' &&
        isLast(unit, index) &&
        answer !== undefined &&
        isKept(answer) &&
        // A stream that has begun is cut, where it is not over already.
        (this.#commitOn === 'onSend' || unit.program.end !== 'stream')
      ) {
        complaints.push(`${what}: a failed statement was swallowed, and yet it was a success`)
      }
      if (fate === 'gone' && kept.length > 0) complaints.push(`${what}: ${kept} should be gone`)
      if (fate === 'kept' && kept.length < segment.rows.length)
        complaints.push(`${what}: ${segment.rows} should be there`)
      if (kept.length > 0 && kept.length < segment.rows.length)
        complaints.push(`${what}: only ${kept} of ${segment.rows}`)
      if (new Set(kept.map((row) => rows.get(row))).size > 1) complaints.push(`${what}: in several transactions`)
      for (const row of segment.rows) expected.add(row)
    }
    for (const row of rows.keys()) {
      if (row.startsWith(`${unit.id}/`) && !expected.has(row)) complaints.push(`${row} was undone, and is there`)
    }
    return complaints
  }

  /** What must have become of the last transaction, by what the client was told. */
  #fateBy(answer: Answer | undefined, { program }: Unit, isCalm: boolean): Fate {
    if (answer === undefined) return 'either'
    if (!isKept(answer)) return isUnknown(answer) ? 'either' : 'gone'
    const isToldAfter = this.#commitOn === 'onSend' && program.end !== 'stream'
    return isToldAfter || isCalm ? 'kept' : 'either'
  }

  async #leftOpen(): Promise<string[]> {
    for (let attempt = 0; ; attempt++) {
      const { checkedOut, waiting, holders, waiters } = this.app.db.snapshot()
      if (checkedOut + waiting + holders.length + waiters.length === 0) return []
      if (attempt === 400) return [`${checkedOut} checked out and ${waiting} waiting after two seconds`]
      await pause(5)
    }
  }
}

const isKept = ({ status }: Answer): boolean => status < 400
const isLast = ({ segments }: Unit, index: number): boolean => index === segments.length - 1
