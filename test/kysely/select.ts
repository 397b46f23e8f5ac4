import { sql } from 'kysely'
import { jsonArrayFrom, jsonBuildObject, jsonObjectFrom } from 'kysely/helpers/postgres'
import { createDatabase } from '../support/database.ts'
import { t } from '../support/test.ts'
import { answers, ZOO } from '../support/zoo.ts'

/* Selects of every kind, on the session of a request. */

const database = await createDatabase(t, { sql: ZOO })
const names = (rows: readonly { name: string }[]) => rows.map(({ name }) => name)

answers(database, {
  'one column, one row': [
    (db) => db.selectFrom('people').select('name').where('id', '=', 1).executeTakeFirst(),
    { name: 'Ada' },
  ],
  'no row': [(db) => db.selectFrom('people').select('name').where('id', '=', 99).executeTakeFirst(), undefined],
  'aliases of columns, tables and subqueries': [
    (db) =>
      db
        .selectFrom('people as p')
        .select((eb) => [
          'p.name as who',
          eb.selectFrom('pets').whereRef('owner_id', '=', 'p.id').select(eb.fn.countAll<string>().as('n')).as('count'),
        ])
        .orderBy('p.id')
        .execute(),
    [
      { who: 'Ada', count: '2' },
      { who: 'Grace', count: '1' },
      { who: 'Linus', count: '0' },
    ],
  ],
  'from a subquery': [
    (db) =>
      db
        .selectFrom((eb) => eb.selectFrom('pets').select(['species', 'name']).where('species', '=', 'cat').as('cats'))
        .select('cats.name')
        .orderBy('cats.name')
        .execute()
        .then(names),
    ['Dot', 'Moth'],
  ],
  'inner, left, right and full joins': [
    async (db) => {
      const joined = db.selectFrom('people')
      const inner = await joined.innerJoin('pets', 'pets.owner_id', 'people.id').select('pets.name').execute()
      const left = await joined.leftJoin('pets', 'pets.owner_id', 'people.id').select('people.name').execute()
      const right = await joined.rightJoin('pets', 'pets.owner_id', 'people.id').select('pets.name').execute()
      const full = await joined.fullJoin('pets', 'pets.owner_id', 'people.id').select('pets.name').execute()
      return [inner, left, right, full].map(({ length }) => length)
    },
    [3, 4, 4, 5],
  ],
  'a join on several conditions, and a lateral one': [
    (db) =>
      db
        .selectFrom('people')
        .innerJoin('pets', (join) => join.onRef('pets.owner_id', '=', 'people.id').on('species', '=', 'cat'))
        .innerJoinLateral(
          (eb) =>
            eb
              .selectFrom('pets as p')
              .whereRef('p.owner_id', '=', 'people.id')
              .select((sub) => sub.fn.max('p.weight').as('most'))
              .as('l'),
          (join) => join.onTrue(),
        )
        .select(['people.name', 'pets.name as cat', 'l.most'])
        .orderBy('people.id')
        .execute(),
    [
      { name: 'Ada', cat: 'Dot', most: '20.00' },
      { name: 'Grace', cat: 'Moth', most: '3.25' },
    ],
  ],
  'where: in, not in, between, like, is null, or, and, not': [
    async (db) => {
      const people = db.selectFrom('people').select('name').orderBy('id')
      return Promise.all([
        people.where('id', 'in', [1, 3]).execute().then(names),
        people.where('id', 'not in', [1, 3]).execute().then(names),
        people
          .where((eb) => eb.between('born', 1900, 1910))
          .execute()
          .then(names),
        people.where('name', 'like', '%a%').execute().then(names),
        people.where('born', 'is', null).execute().then(names),
        people
          .where((eb) => eb.or([eb('name', '=', 'Ada'), eb('born', 'is', null)]))
          .execute()
          .then(names),
        people
          .where((eb) => eb.and([eb('id', '>', 1), eb.not(eb('born', 'is', null))]))
          .execute()
          .then(names),
        people
          .where((eb) => eb.and({ name: 'Ada', born: 1815 }))
          .execute()
          .then(names),
      ])
    },
    [['Ada', 'Linus'], ['Grace'], ['Grace'], ['Ada', 'Grace'], ['Linus'], ['Ada', 'Linus'], ['Grace'], ['Ada']],
  ],
  'where exists, tuples, any of an array': [
    async (db) => {
      const people = db.selectFrom('people').select('name').orderBy('id')
      return Promise.all([
        people
          .where((eb) => eb.exists(eb.selectFrom('pets').whereRef('owner_id', '=', 'people.id').select('id')))
          .execute()
          .then(names),
        people
          .where((eb) => eb(eb.refTuple('name', 'born'), 'in', [eb.tuple('Ada', 1815), eb.tuple('Grace', 1)]))
          .execute()
          .then(names),
        people
          .where(({ eb, fn }) => eb(eb.val('navy'), '=', fn.any('tags')))
          .execute()
          .then(names),
      ])
    },
    [['Ada', 'Grace'], ['Ada'], ['Grace']],
  ],
  'group by, having, aggregates with distinct and filter': [
    (db) =>
      db
        .selectFrom('pets')
        .select(({ fn }) => [
          'species',
          fn.count<string>('id').as('all'),
          fn.count<string>('owner_id').distinct().as('owners'),
          fn.sum<string>('weight').filterWhere('weight', '>', 4).as('heavy'),
        ])
        .groupBy('species')
        .having((eb) => eb.fn.countAll(), '>', 1)
        .orderBy('species')
        .execute(),
    [
      { species: 'cat', all: '2', owners: '2', heavy: '4.50' },
      { species: 'dog', all: '2', owners: '1', heavy: '20.00' },
    ],
  ],
  'order by with nulls, limit, offset, fetch, distinct on': [
    async (db) => [
      await db
        .selectFrom('people')
        .select('name')
        .orderBy('born', (o) => o.desc().nullsLast())
        .execute()
        .then(names),
      await db.selectFrom('people').select('name').orderBy('id').limit(1).offset(1).execute().then(names),
      await db.selectFrom('people').select('name').orderBy('id').fetch(2).execute().then(names),
      await db
        .selectFrom('pets')
        .distinctOn('species')
        .select('name')
        .orderBy('species')
        .orderBy('id')
        .execute()
        .then(names),
      await db.selectFrom('pets').distinct().select('species as name').orderBy('species').execute().then(names),
    ],
    [['Grace', 'Ada', 'Linus'], ['Grace'], ['Ada', 'Grace'], ['Dot', 'Rex'], ['cat', 'dog']],
  ],
  'union, intersect, except': [
    async (db) => {
      const people = db.selectFrom('people').select('name')
      const pets = db.selectFrom('pets').select('name')
      return [
        (await people.union(pets).execute()).length,
        (await people.unionAll(people).execute()).length,
        (await people.intersect(people.where('id', '=', 1)).execute()).length,
        (await people.except(people.where('id', '=', 1)).execute()).length,
      ]
    },
    [7, 6, 1, 2],
  ],
  'with, and with recursive': [
    async (db) => [
      await db
        .with('cats', (db) => db.selectFrom('pets').where('species', '=', 'cat').selectAll())
        .with('owners', (db) =>
          db.selectFrom('cats').innerJoin('people', 'people.id', 'cats.owner_id').select('people.name'),
        )
        .selectFrom('owners')
        .selectAll()
        .orderBy('name')
        .execute()
        .then(names),
      await db
        .withRecursive('n(i)', (db) =>
          db.selectNoFrom(sql<number>`1`.as('i')).unionAll(
            db
              .selectFrom('n')
              .where('i', '<', 4)
              .select((eb) => eb('i', '+', 1).as('i')),
          ),
        )
        .selectFrom('n')
        .select('i')
        .execute(),
    ],
    [
      ['Ada', 'Grace'],
      [{ i: 1 }, { i: 2 }, { i: 3 }, { i: 4 }],
    ],
  ],
  'window functions': [
    (db) =>
      db
        .selectFrom('pets')
        .select(({ fn }) => [
          'name',
          fn
            .agg<string>('rank')
            .over((over) => over.partitionBy('species').orderBy('weight', 'desc'))
            .as('rank'),
        ])
        .where('weight', 'is not', null)
        .orderBy('id')
        .execute(),
    [
      { name: 'Dot', rank: '1' },
      { name: 'Rex', rank: '1' },
      { name: 'Moth', rank: '2' },
    ],
  ],
  'case, coalesce, cast, functions, operators': [
    (db) =>
      db
        .selectFrom('people')
        .select((eb) => [
          eb.case().when('born', '<', 1900).then('old').when('born', 'is', null).then('?').else('new').end().as('age'),
          eb.fn.coalesce('born', eb.lit(0)).as('born'),
          eb.cast<string>('id', 'text').as('text'),
          eb.fn<string>('upper', ['name']).as('upper'),
          eb('id', '*', 2).as('twice'),
        ])
        .orderBy('id')
        .execute(),
    [
      { age: 'old', born: 1815, text: '1', upper: 'ADA', twice: 2 },
      { age: 'new', born: 1906, text: '2', upper: 'GRACE', twice: 4 },
      { age: '?', born: 0, text: '3', upper: 'LINUS', twice: 6 },
    ],
  ],
  'into JSON: paths, arrays, objects, nested rows': [
    (db) =>
      db
        .selectFrom('people')
        .select((eb) => [
          eb.ref('profile', '->>').key('city').as('city'),
          eb.ref('profile', '->').key('langs').at(0).as('first'),
          jsonArrayFrom(
            eb.selectFrom('pets').whereRef('owner_id', '=', 'people.id').select('pets.name').orderBy('id'),
          ).as('pets'),
          jsonObjectFrom(eb.selectFrom('pets').whereRef('owner_id', '=', 'people.id').select('species').limit(1)).as(
            'one',
          ),
          jsonBuildObject({ id: eb.ref('id') }).as('built'),
        ])
        .orderBy('id')
        .execute(),
    [
      {
        city: 'London',
        first: 'en',
        pets: [{ name: 'Dot' }, { name: 'Rex' }],
        one: { species: 'cat' },
        built: { id: 1 },
      },
      { city: 'New York', first: 'en', pets: [{ name: 'Moth' }], one: { species: 'cat' }, built: { id: 2 } },
      { city: null, first: null, pets: [], one: null, built: { id: 3 } },
    ],
  ],
  'locks: for update, for share, skip locked': [
    async (db) => [
      await db.selectFrom('people').select('name').where('id', '=', 1).forUpdate().execute().then(names),
      await db.selectFrom('people').select('name').where('id', '=', 2).forShare().skipLocked().execute().then(names),
      await db.selectFrom('people').select('name').where('id', '=', 3).forNoKeyUpdate().noWait().execute().then(names),
    ],
    [['Ada'], ['Grace'], ['Linus']],
  ],
  'dynamic references, $if, $call, $castTo, $narrowType': [
    (db) => {
      const { ref } = db.dynamic
      return db
        .selectFrom('people')
        .select('name')
        .$if(true, (query) => query.where('born', 'is not', null))
        .$if(false, (query) => query.where('id', '=', 99))
        .$call((query) => query.orderBy(ref<'id'>('people.id'), 'desc'))
        .$castTo<{ name: string }>()
        .execute()
        .then(names)
    },
    ['Grace', 'Ada'],
  ],
  'sql templates: ref, table, id, lit, raw, join, fragments, values': [
    async (db) => {
      const list = sql.join([1, 2].map((id) => sql.val(id)))
      const condition = sql`${sql.ref('people.id')} in (${list}) and born < ${1900}`
      const { rows } = await sql<{ name: string }>`
        select ${sql.id('name')} from ${sql.table('people')} where ${condition} and ${sql.lit(true)} ${sql.raw('order by id')}
      `.execute(db)
      return names(rows)
    },
    ['Ada'],
  ],
  explain: [async (db) => (await db.selectFrom('people').selectAll().explain('json')).length, 1],
  'no from': [
    (db) => db.selectNoFrom((eb) => [eb.val(1).as('one'), eb.lit(2).as('two')]).execute(),
    [{ one: '1', two: 2 }],
  ],
  'stream: all of it, in chunks, and given up early': [
    async (db) => {
      const seen: string[] = []
      for await (const { name } of db.selectFrom('pets').select('name').orderBy('id').stream(2)) seen.push(name)
      for await (const { name } of db.selectFrom('people').select('name').orderBy('id').stream(1)) {
        seen.push(name)
        break
      }
      return [...seen, (await db.selectFrom('people').selectAll().execute()).length]
    },
    ['Dot', 'Rex', 'Moth', 'Stray', 'Ada', 3],
  ],
})
