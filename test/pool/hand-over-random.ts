import { setTimeout as moment } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Generated } from 'kysely'
import type { Session } from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { captureLog } from '../support/captured-log.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { HttpClient, listen } from '../support/http-client.ts'
import { MODES } from '../support/modes.ts'
import { pidOf } from '../support/notebook.ts'
import { startProxy } from '../support/proxy.ts'
import { type Test, t, test } from '../support/test.ts'

/* Everything at once on connections that are handed over at every turn: every row is accounted for. */

type Deeds = {
  deeds: { id: Generated<number>; unit: string; part: number; fate: string; tx: Generated<string> }
}

const database = await createDatabase(t, {
  sql: `
    create table deeds (id int generated always as identity primary key, unit text not null, part int not null,
      fate text not null, tx xid8 not null default pg_current_xact_id());
    create function at_commit() returns trigger language plpgsql as $$
    begin
      if new.fate = 'slow' then perform pg_sleep(0.01); end if;
      if new.fate = 'doomed' then raise exception 'doomed' using errcode = '23514'; end if;
      return null;
    end $$;
    create constraint trigger at_commit after insert on deeds deferrable initially deferred
      for each row execute function at_commit()`,
})

const REQUESTS = 1500
// Ten seconds on a quiet machine.
t.setTimeout(120_000)
const USERS = 14
const PREFIX = 'FST_REQUEST_DB_'
const ENDS = ['answer', 'answer', 'answer', 'answer', 'answer', 'throw', 'refuse', 'commit', 'rollback'] as const
const FATES = ['', '', '', '', '', '', 'doomed', 'failing', 'slow'] as const
const SAID = new Set(['OK', 'rolled back', `${PREFIX}COMMIT_UNKNOWN`])
// What may be said to somebody whose rows are surely gone then. 57014: a statement or COMMIT was cancelled from outside.
const SURELY_GONE = new Set([
  ...['POOL_TIMEOUT', 'UNAVAILABLE', 'CONNECTION_LOST', 'TRANSACTION_ABORTED', 'SESSION_ENDED'].map(
    (code) => PREFIX + code,
  ),
  ...['57014', '23502', '23514', 'mine', 'refused'],
])

/** One transaction of a request: what it writes and how it ends. */
interface Unit {
  readonly name: string
  readonly style: keyof typeof STYLES
  readonly fate: (typeof FATES)[number]
  readonly end: (typeof ENDS)[number]
}
type Verdict = 'kept' | 'gone' | 'either'

const row = (db: Session, { name, fate }: Unit, part: number) =>
  db
    .withTables<Deeds>()
    .insertInto('deeds')
    .values({ unit: name, part, fate: fate === 'failing' ? '' : fate })

const nested = (db: Session, unit: Unit, part: number) =>
  db.transaction().execute(async (trx) => {
    await row(trx as unknown as Session, unit, part).execute()
  })

/** The ways to write the two rows of a unit. */
const STYLES = {
  serial: async (db: Session, unit: Unit) => {
    await row(db, unit, 1).execute()
    await row(db, unit, 2).execute()
  },
  parallel: (db: Session, unit: Unit) => Promise.all([row(db, unit, 1).execute(), row(db, unit, 2).execute()]),
  added: async (db: Session, unit: Unit) => {
    db.add(row(db, unit, 1))
    db.add(row(db, unit, 2))
  },
  behind: async (db: Session, unit: Unit) => {
    await row(db, unit, 1).execute()
    db.add(row(db, unit, 2))
  },
  begun: async (db: Session, unit: Unit) => {
    await db.begin()
    await STYLES.added(db, unit)
  },
  nested: async (db: Session, unit: Unit) => {
    await nested(db, unit, 1)
    await nested(db, unit, 3).then(
      () => row(db, unit, 2).execute(),
      () => row(db, unit, 2).execute(),
    )
    await db.withTables<Deeds>().deleteFrom('deeds').where('unit', '=', unit.name).where('part', '=', 3).execute()
  },
  raw: (db: Session, { name, fate }: Unit) =>
    db.withClient((client) =>
      client.query('insert into deeds (unit, part, fate) select $1, part, $2 from generate_series(1, 2) part', [
        name,
        fate === 'failing' ? '' : fate,
      ]),
    ),
  streamed: async (db: Session, unit: Unit) => {
    await row(db, unit, 1).execute()
    const rows = db.withTables<Deeds>().selectFrom('deeds').select('id').stream(2)
    for await (const { id } of rows) if (id % 3 === 0) break
    await row(db, unit, 2).execute()
  },
  unawaited: async (db: Session, unit: Unit) => {
    for (const part of [1, 2])
      row(db, unit, part)
        .execute()
        .catch(() => {})
  },
}

/** Reproducible chance. */
function dice(seed: number) {
  let state = seed
  const chance = () => {
    state = (state * 1_103_515_245 + 12_345) % 2_147_483_648
    return state / 2_147_483_648
  }
  const pick = <T>(of: readonly T[]): T => of[Math.floor(chance() * of.length)] as T
  return { chance, pick }
}

/** What became of the units, as far as it was said. */
class Account {
  readonly verdicts = new Map<string, Verdict>()
  readonly told: Record<string, number> = {}
  // The unit that each request is in.
  readonly #open = new Map<number, string>()

  plan(units: readonly Unit[], verdict: Verdict): void {
    for (const { name } of units) this.verdicts.set(name, verdict)
  }

  begins(unit: string): void {
    this.#open.set(Number.parseInt(unit, 10), unit)
  }

  /** The unit that a request is in has ended; `code` is undefined for success. */
  ends(request: number, code: string | undefined): void {
    const said = code ?? 'OK'
    this.told[said] = (this.told[said] ?? 0) + 1
    const unit = this.#open.get(request)
    this.#open.delete(request)
    if (unit === undefined) return
    this.verdicts.set(unit, code === undefined ? 'kept' : code === `${PREFIX}COMMIT_UNKNOWN` ? 'either' : 'gone')
  }
}

const codeOf = (error: unknown) => (error as { code?: string }).code ?? String(error)

/** POST / does the units of its body one after the other; one that does not end by hand ends with the answer. */
function declareRoutes(app: FastifyInstance, account: Account, all: { inside(): Promise<void> }): void {
  app.post<{ Body: Unit[] }>('/', async ({ db, body }, reply) => {
    for (const unit of body) {
      const request = Number.parseInt(unit.name, 10)
      account.begins(unit.name)
      await STYLES[unit.style](db, unit)
      if (unit.fate === 'failing') db.add(row(db, { ...unit, name: null as unknown as string }, 4))
      if (unit.end === 'throw') throw Object.assign(new Error('mine'), { code: 'mine' })
      if (unit.end === 'refuse') return reply.code(409).send({ code: 'refused' })
      if (unit.end === 'rollback') {
        await db.rollback()
        account.ends(request, 'rolled back')
      } else if (unit.end === 'commit') {
        const failure = await db.commit().then(
          () => undefined,
          (error: unknown) => codeOf(error),
        )
        account.ends(request, failure)
      }
    }
    return 'kept'
  })
  app.get('/own', { config: { db: { autocommit: true } } }, ({ db }) => pidOf(db))
  app.get('/all', async ({ db }) => {
    const pid = await pidOf(db)
    await all.inside()
    return { pid }
  })
}

/** Resolves for everybody when `count` are inside. */
function meeting(count: number) {
  const all = gate()
  let inside = 0
  return {
    inside: () => {
      if (++inside === count) all.open()
      return all.opened
    },
  }
}

for (const commitOn of MODES) {
  test(`${REQUESTS} requests of all kinds, backends cancelled and killed at random (${commitOn})`, async (t) => {
    await database.query('delete from deeds')
    const { chance, pick } = dice(commitOn === 'onSend' ? 7 : 11)
    const size = 2 + Math.floor(chance() * 3)
    const account = new Account()
    const log = captureLog('error')
    const proxy = await startProxy(t, database.connectionString)
    const url = new URL(proxy.connectionString)
    const application = `random ${commitOn}`
    url.searchParams.set('application_name', application)
    const pool = { size, timeoutMillis: 150, prePing: { idleMillis: 20, timeoutMillis: 500 } }
    const app = await buildApp(
      t,
      database,
      { connectionString: url.href, commitOn, pool },
      (app) => declareRoutes(app, account, meeting(size)),
      { logger: log.options, genReqId: ({ headers }) => String(headers['x-request']) },
    )
    const port = await listen(app)

    const answers = new Map<number, string | undefined>()
    const plan = (n: number): Unit[] => {
      const units: Unit[] = []
      const kinds = Object.keys(STYLES) as (keyof typeof STYLES)[]
      do {
        units.push({ name: `${n}.${units.length}`, style: pick(kinds), fate: pick(FATES), end: pick(ENDS) })
      } while (['commit', 'rollback'].includes(units.at(-1)?.end ?? '') && units.length < 3)
      return units
    }
    const send = async (n: number) => {
      const units = plan(n)
      const leaves = chance() < 0.06
      account.plan(units, leaves ? 'either' : 'gone')
      if (leaves) {
        const client = new HttpClient(port).send('POST', '/', { body: units })
        await moment(chance() * 12)
        client.reset()
        return
      }
      const headers = { 'x-request': String(n) }
      const answer = await app.inject({ method: 'POST', url: '/', body: units, headers })
      answers.set(n, answer.statusCode === 200 ? undefined : codeOf(answer.json()))
    }
    let next = 0
    const pending = new Set<number>()
    let movedAt = performance.now()
    const user = async () => {
      while (next < REQUESTS) {
        const n = next++
        pending.add(n)
        movedAt = performance.now()
        if (n % 40 === 39) await app.db.ping().catch(() => {})
        else if (n % 40 === 38) await app.inject('/own')
        else await send(n)
        pending.delete(n)
      }
    }
    const vandal = async () => {
      while (next < REQUESTS && performance.now() - movedAt < 3000) {
        const victims = await database.backends(application)
        const how = chance() < 0.75 ? 'pg_cancel_backend' : 'pg_terminate_backend'
        if (victims.length > 0) await database.query(`select ${how}($1)`, [pick(victims).pid])
        await moment(chance() * 15)
      }
    }
    const users = Promise.all(Array.from({ length: USERS }, user))
    await vandal()
    await eventually(() => pending.size === 0, { withinMillis: 5000, describe: () => `no answer to ${[...pending]}` })
    await users
    await eventually(() => app.db.snapshot().checkedOut + app.db.snapshot().waiting === 0, {
      withinMillis: 5000,
      describe: () => JSON.stringify(app.db.snapshot()),
    })
    // Whose answer had left before COMMIT failed is told by the log.
    for (const { msg, reqId, err } of log.lines) {
      if (msg.includes('after the response was sent')) answers.set(Number(reqId), err?.code ?? err?.message)
    }
    for (const [request, code] of answers) account.ends(request, code)
    t.comment(JSON.stringify({ size, ...account.told }), JSON.stringify(app.db.snapshot().totals))
    t.ok(app.db.snapshot().totals.handOvers > REQUESTS / 4, 'most of them followed another')
    await audit(t, account)
    const last = await Promise.all(Array.from({ length: size }, () => app.inject('/all')))
    t.equal(new Set(last.map((answer) => answer.json().pid)).size, size, 'every slot is there')
  })
}

async function audit(t: Test, { verdicts, told }: Account) {
  const said = Object.keys(told).filter((code) => !SAID.has(code) && !SURELY_GONE.has(code))
  t.strictSame(said, [], 'nobody is told anything strange')
  const units = new Map<string, { parts: number[]; txs: Set<string> }>()
  const owners = new Map<string, Set<string>>()
  for (const { unit, part, tx } of await database.rows<{ unit: string; tx: string; part: number }>('deeds')) {
    const found = units.get(unit) ?? { parts: [], txs: new Set() }
    found.parts.push(part)
    found.txs.add(tx)
    units.set(unit, found)
    owners.set(tx, (owners.get(tx) ?? new Set()).add(unit))
  }
  const isTorn = ({ parts, txs }: { parts: number[]; txs: Set<string> }) =>
    parts.sort().join() !== '1,2' || txs.size !== 1
  const kept = [...verdicts].filter(([, verdict]) => verdict === 'kept').map(([unit]) => unit)
  const gone = [...verdicts].filter(([, verdict]) => verdict === 'gone').map(([unit]) => unit)
  t.ok(kept.length > REQUESTS / 4)
  t.strictSame(
    kept.filter((unit) => !units.has(unit)),
    [],
    'what was acknowledged is there',
  )
  t.strictSame(
    gone.filter((unit) => units.has(unit)),
    [],
    'what was refused is not',
  )
  t.strictSame(
    [...units].filter(([, unit]) => isTorn(unit)),
    [],
    'all of a transaction or nothing, once',
  )
  t.strictSame(
    [...owners].filter(([, { size }]) => size > 1),
    [],
    'no transaction committed the rows of two',
  )
}
