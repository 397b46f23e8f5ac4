import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { t, test } from '../support/test.ts'
import { answers, visit, ZOO, type ZooSession } from '../support/zoo.ts'

/* Inserts, updates, deletes and merges, with what they return and count. */

const database = await createDatabase(t, { sql: ZOO })
const petNames = async (db: ZooSession) =>
  (await db.selectFrom('pets').select('name').orderBy('name').execute()).map(({ name }) => name)

answers(database, {
  'an insert counts, and returns what it is asked for': [
    async (db) => {
      const [counted] = await db.insertInto('people').values({ name: 'Alan' }).execute()
      const rows = await db
        .insertInto('people')
        .values([
          { name: 'Barbara', born: 1939 },
          { name: 'Donald', born: 1938, tags: ['tex'] },
        ])
        .returning(['name', 'tags'])
        .execute()
      return [counted?.numInsertedOrUpdatedRows, rows]
    },
    [
      1n,
      [
        { name: 'Barbara', tags: [] },
        { name: 'Donald', tags: ['tex'] },
      ],
    ],
  ],
  'an insert from a select, of default values, of expressions': [
    async (db) => {
      await db
        .insertInto('pets')
        .columns(['name', 'species'])
        .expression((eb) =>
          eb
            .selectFrom('people')
            .select(['name', eb.val('human').as('species')])
            .where('id', '<', 3),
        )
        .execute()
      const { name } = await db
        .insertInto('pets')
        .values((eb) => ({
          name: eb.fn<string>('upper', [eb.val('mr x')]),
          species: sql`lower(${'CAT'})`,
        }))
        .returning('name')
        .executeTakeFirstOrThrow()
      return [name, (await petNames(db)).length]
    },
    ['MR X', 7],
  ],
  'on conflict: nothing, update, by constraint, with excluded and where': [
    async (db) => {
      const nothing = await db
        .insertInto('people')
        .values({ name: 'Ada', born: 1 })
        .onConflict((oc) => oc.column('name').doNothing())
        .executeTakeFirst()
      const updated = await db
        .insertInto('people')
        .values({ name: 'Ada', born: 1816 })
        .onConflict((oc) =>
          oc
            .constraint('people_name_key')
            .doUpdateSet((eb) => ({ born: eb.ref('excluded.born') }))
            .where('people.id', '=', 1),
        )
        .returning('born')
        .executeTakeFirst()
      return [nothing.numInsertedOrUpdatedRows, updated]
    },
    [0n, { born: 1816 }],
  ],
  'an update counts, sets expressions, takes from other tables, returns': [
    async (db) => {
      const counted = await db
        .updateTable('pets')
        .set({ species: 'tiger' })
        .where('species', '=', 'cat')
        .executeTakeFirst()
      const rows = await db
        .updateTable('pets')
        .from('people')
        .whereRef('people.id', '=', 'pets.owner_id')
        .where('people.name', '=', 'Grace')
        .set((eb) => ({ weight: eb('weight', '+', 1), name: eb.ref('people.name') }))
        .returning(['pets.name', 'pets.weight'])
        .execute()
      return [counted.numUpdatedRows, rows]
    },
    [2n, [{ name: 'Grace', weight: '4.25' }]],
  ],
  'a delete counts, uses other tables, cascades, returns': [
    async (db) => {
      const rows = await db
        .deleteFrom('pets')
        .using('people')
        .whereRef('people.id', '=', 'pets.owner_id')
        .where('people.name', '=', 'Ada')
        .where('pets.species', '=', 'dog')
        .returning('pets.name')
        .execute()
      const counted = await db.deleteFrom('people').where('name', '=', 'Ada').executeTakeFirst()
      return [rows, counted.numDeletedRows, await petNames(db)]
    },
    [[{ name: 'Rex' }], 1n, ['Moth', 'Stray']],
  ],
  'merge: matched, not matched, counted': [
    async (db) => {
      const merged = await db
        .mergeInto('pets')
        .using('people', 'people.name', 'pets.name')
        .whenMatched()
        .thenDelete()
        .whenNotMatched()
        .thenInsertValues((eb) => ({ name: eb.ref('people.name'), species: 'human', owner_id: eb.ref('people.id') }))
        .executeTakeFirstOrThrow()
      return [merged.numChangedRows, (await petNames(db)).length]
    },
    [3n, 7],
  ],
  'writes in WITH': [
    (db) =>
      db
        .with('gone', (db) => db.deleteFrom('pets').where('owner_id', 'is', null).returning('name'))
        .with('kept', (db) =>
          db.insertInto('people').columns(['name']).expression(db.selectFrom('gone').select('name')).returning('name'),
        )
        .selectFrom('kept')
        .selectAll()
        .execute(),
    [{ name: 'Stray' }],
  ],
  'arrays and JSON go in and come out': [
    async (db) => {
      await db
        .insertInto('people')
        .values({ name: 'Eve', tags: ['a"b', 'c,d', ''], profile: JSON.stringify({ city: 'Rome', langs: ['it'] }) })
        .execute()
      return db.selectFrom('people').select(['tags', 'profile']).where('name', '=', 'Eve').executeTakeFirst()
    },
    { tags: ['a"b', 'c,d', ''], profile: { city: 'Rome', langs: ['it'] } },
  ],
  'executeTakeFirstOrThrow throws its own error, and the transaction goes on': [
    async (db) => {
      const query = db.deleteFrom('pets').where('id', '=', 99).returning('id')
      const error = await query
        .executeTakeFirstOrThrow(() => new Error('no such pet'))
        .catch((error: Error) => error.message)
      return [error, (await petNames(db)).length]
    },
    ['no such pet', 4],
  ],
})

test('what an error tells: the code, the constraint, and the line that asked', async (t) => {
  const error = await visit(t, database, (db) =>
    db
      .transaction()
      .execute(async (trx) => {
        await trx.insertInto('people').values({ name: 'Ada' }).execute()
      })
      .catch((error: Error) => error),
  )
  t.match(error, { code: '23505', constraint: 'people_name_key' })
  t.match((error as Error).stack, /writes\.ts/)
})
