import { sql } from 'kysely'
import requestDb, { type Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { gate } from '../support/gate.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })
const insert = (db: Pick<Session, 'insertInto'>, note: string) => db.insertInto('notes').values({ note }).execute()
const notes = async () => (await database.rows<{ note: string }>('notes')).map(({ note }) => note)

t.beforeEach(() => database.query('truncate notes restart identity'))

test('nested transactions of two databases keep out of each other', async (t) => {
  const other = await createDatabase(t, { sql: NOTES })
  let reports: Session | undefined
  const { post } = await oneRoute(
    t,
    database,
    async (db, request) => {
      reports = (request as unknown as { reports: Session }).reports
      await db.transaction().execute(async () => {
        await insert(db, 'outer')
        await t.rejects(
          reports!.transaction().execute(async () => {
            await insert(reports!, 'report')
            await db.transaction().execute(() => insert(db, 'inner'))
            throw new Error('reports')
          }),
        )
        await insert(reports!, 'report again')
      })
      return 'ok'
    },
    {
      beside: async (app) => {
        await app.register(requestDb, { connectionString: other.connectionString, decorator: 'reports' })
      },
    },
  )
  t.equal((await post()).statusCode, 200)
  t.strictSame(await notes(), ['outer', 'inner'])
  t.match(await other.rows('notes'), [{ note: 'report again' }])
})

test('nested transactions of two requests at once keep out of each other', async (t) => {
  const bothInside = gate()
  let inside = 0
  const { app } = await oneRoute(t, database, () => 'unused', {
    beside: (app) => {
      app.post<{ Params: { n: string } }>('/:n', async ({ db, params: { n } }) => {
        await db.transaction().execute(async () => {
          await insert(db, `${n} kept`)
          if (++inside === 2) bothInside.open()
          await bothInside.opened
          await db
            .transaction()
            .execute(async () => {
              await insert(db, `${n} gone`)
              throw new Error('inner')
            })
            .catch(() => {})
        })
        return 'ok'
      })
    },
  })
  const answers = await Promise.all(['1', '2'].map((n) => app.inject({ method: 'POST', url: `/${n}` })))
  t.strictSame(
    answers.map(({ statusCode }) => statusCode),
    [200, 200],
  )
  t.strictSame((await notes()).sort(), ['1 kept', '2 kept'])
})

/** Numbers from 0 to 1, the same ones for the same seed, so that a failure can be seen again. */
function randomFrom(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 32
  }
}

interface Plan {
  readonly name: string
  readonly fails: 'no' | 'throws' | 'sql'
  readonly children: Plan[]
}

function planOf(random: () => number, name: string, depth: number): Plan {
  const children = depth === 0 ? 0 : Math.floor(random() * 4)
  const fate = random()
  return {
    name,
    fails: name !== '0' && fate < 0.2 ? 'throws' : name !== '0' && fate < 0.35 ? 'sql' : 'no',
    children: Array.from({ length: children }, (_, n) => planOf(random, `${name}.${n}`, depth - 1)),
  }
}

async function carryOut(db: Session, plan: Plan): Promise<void> {
  await insert(db, `${plan.name} begins`)
  await Promise.allSettled([
    ...plan.children.map((child) => db.transaction().execute(() => carryOut(db, child))),
    insert(db, `${plan.name} meanwhile`),
  ])
  await insert(db, `${plan.name} ends`)
  if (plan.fails === 'throws') throw new Error(plan.name)
  if (plan.fails === 'sql') await sql`select 1 / 0`.execute(db)
}

function expectedOf({ name, fails, children }: Plan): string[] {
  if (fails !== 'no') return []
  return [`${name} begins`, `${name} meanwhile`, `${name} ends`, ...children.flatMap(expectedOf)]
}

for (const seed of [1, 7, 23, 42, 99, 1234, 31_337, 77_777]) {
  test(`a tree of nested transactions, some failing, keeps exactly what did not fail (seed ${seed})`, async (t) => {
    const plan = planOf(randomFrom(seed), '0', 3)
    const { post } = await oneRoute(t, database, async (db) => {
      await carryOut(db, plan)
      return 'ok'
    })
    t.equal((await post()).statusCode, 200)
    t.strictSame((await notes()).sort(), expectedOf(plan).sort())
  })
}
