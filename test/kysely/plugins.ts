import {
  CamelCasePlugin,
  DeduplicateJoinsPlugin,
  type KyselyPlugin,
  ParseJSONResultsPlugin,
  type PluginTransformQueryArgs,
  type PluginTransformResultArgs,
  sql,
} from 'kysely'
import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { oneRoute } from '../support/one-route.ts'
import { type Test, t, test } from '../support/test.ts'

/* Kysely's plugins, for all sessions and for one, in everything that a session does. */

type Tables = { flightLegs: { legId: number; seatsLeft: number } }
type CamelSession = Session<Tables>

const database = await createDatabase(t, { sql: 'create table flight_legs (leg_id int, seats_left int)' })
t.beforeEach(() => database.query('delete from flight_legs'))

/** Says what each result has passed through. */
class Shout implements KyselyPlugin {
  readonly seen: string[] = []

  transformQuery({ node }: PluginTransformQueryArgs) {
    this.seen.push(node.kind)
    return node
  }

  async transformResult({ result }: PluginTransformResultArgs) {
    return { ...result, rows: result.rows.map((row) => ({ ...row, shouted: true })) }
  }
}

async function inRequest<T>(t: Test, plugins: KyselyPlugin[], fn: (db: CamelSession) => Promise<T>): Promise<T> {
  let result: T | undefined
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      result = await fn(db as unknown as CamelSession)
      return 'ok'
    },
    { plugins },
  )
  const answer = await post()
  t.equal(answer.statusCode, 200, answer.body)
  return result as T
}

const leg = (legId: number) => ({ legId, seatsLeft: legId * 10 })

test('camel case, in statements, deferred writes, nested transactions, streams, and remembered reads', async (t) => {
  const rows = await inRequest(t, [new CamelCasePlugin()], async (db) => {
    await db.insertInto('flightLegs').values(leg(1)).execute()
    db.add(db.insertInto('flightLegs').values(leg(2)))
    await db.transaction().execute((trx) => trx.insertInto('flightLegs').values(leg(3)).execute())
    const streamed: unknown[] = []
    for await (const row of db.selectFrom('flightLegs').selectAll().orderBy('legId').stream(1)) streamed.push(row)
    const remembered = await db.remember(db.selectFrom('flightLegs').selectAll().orderBy('legId'))
    t.strictSame(streamed, remembered)
    return remembered
  })
  t.strictSame(rows, [leg(1), leg(2), leg(3)])
  t.strictSame(
    await database.rows('flight_legs'),
    [1, 2, 3].map((id) => ({ leg_id: id, seats_left: id * 10 })),
  )
})

test('a plugin for one handle: the session keeps its own', async (t) => {
  await inRequest(t, [], async (db) => {
    const camel = db.withPlugin(new CamelCasePlugin())
    await camel.insertInto('flightLegs').values(leg(1)).execute()
    const raw = sql`select * from flight_legs`
    t.strictSame((await raw.execute(camel)).rows, [leg(1)])
    t.strictSame((await raw.execute(db)).rows, [{ leg_id: 1, seats_left: 10 }])
    t.strictSame((await raw.execute(camel.withoutPlugins())).rows, [{ leg_id: 1, seats_left: 10 }])
  })
})

test('a plugin of one’s own sees each query once, and what it makes of the rows arrives', async (t) => {
  const shout = new Shout()
  const rows = await inRequest(t, [new CamelCasePlugin(), shout], async (db) => {
    await db.insertInto('flightLegs').values(leg(1)).execute()
    return db.selectFrom('flightLegs').select('legId').execute()
  })
  t.strictSame(rows, [{ legId: 1, shouted: true }])
  t.strictSame(shout.seen, ['InsertQueryNode', 'SelectQueryNode'])
})

test('JSON that comes as text, and joins that are there twice', async (t) => {
  await inRequest(t, [new ParseJSONResultsPlugin(), new DeduplicateJoinsPlugin()], async (db) => {
    const text = await sql<{ value: unknown }>`select '{"a":[1]}'::text as value`.execute(db)
    t.strictSame(text.rows, [{ value: { a: [1] } }])
    const snake = db as unknown as Session<{ flight_legs: { leg_id: number } }>
    const legs = snake
      .selectFrom('flight_legs as a')
      .innerJoin('flight_legs as b', 'b.leg_id', 'a.leg_id')
      .innerJoin('flight_legs as b', 'b.leg_id', 'a.leg_id')
      .select('a.leg_id')
    t.strictSame(await legs.execute(), [])
  })
})

test('a plugin that throws fails its statement, and nothing is sent', async (t) => {
  const broken: KyselyPlugin = {
    transformQuery() {
      throw new Error('not this one')
    },
    transformResult: async ({ result }) => result,
  }
  await inRequest(t, [], async (db) => {
    const derived = db.withPlugin(broken)
    t.throws(() => derived.selectFrom('flightLegs').selectAll().compile(), { message: 'not this one' })
    await t.rejects(async () => derived.selectFrom('flightLegs').selectAll().execute(), { message: 'not this one' })
    t.equal(db.state, 'idle')
  })
})

test('sessions outside of requests, and fastify.db.kysely, have them too', async (t) => {
  const { app } = await oneRoute(t, database, () => {}, { plugins: [new CamelCasePlugin()] })
  const { db } = app as unknown as { db: { session: (fn: (db: CamelSession) => Promise<unknown>) => Promise<unknown> } }
  await db.session((db) => db.insertInto('flightLegs').values(leg(1)).execute())
  t.strictSame((await sql`select * from flight_legs`.execute(app.db.kysely)).rows, [leg(1)])
})
