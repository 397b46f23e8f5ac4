import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { t } from '../support/test.ts'
import { answers, ZOO } from '../support/zoo.ts'

/* Kysely's schema builder inside a session: PostgreSQL's DDL is a part of the transaction. */

const database = await createDatabase(t, { sql: ZOO })

answers(database, {
  'a table with all kinds of columns and constraints, seen by the introspection and gone with the rollback': [
    async (db) => {
      await db.schema
        .createTable('toys')
        .addColumn('id', 'bigserial', (column) => column.primaryKey())
        .addColumn('pet_id', 'integer', (column) => column.references('pets.id').onDelete('cascade').notNull())
        .addColumn('name', 'varchar(20)', (column) => column.defaultTo('ball').notNull())
        .addColumn('price', 'numeric(8, 2)', (column) => column.check(sql`price >= 0`))
        .addColumn('twice', 'numeric', (column) => column.generatedAlwaysAs(sql`price * 2`).stored())
        .addUniqueConstraint('toys_name', ['pet_id', 'name'])
        .execute()
      const tables = await db.introspection.getTables()
      const toys = tables.find(({ name }) => name === 'toys')
      return toys?.columns.map(({ name, dataType, isNullable }) => [name, dataType, isNullable])
    },
    [
      ['id', 'int8', false],
      ['pet_id', 'int4', false],
      ['name', 'varchar', false],
      ['price', 'numeric', true],
      ['twice', 'numeric', true],
    ],
  ],
  'alter table: add, drop, rename, type, null, default, constraint': [
    async (db) => {
      const { schema } = db
      await schema.alterTable('pets').addColumn('born', 'date').execute()
      await schema.alterTable('pets').renameColumn('born', 'birthday').execute()
      await schema
        .alterTable('pets')
        .alterColumn('birthday', (column) => column.setDataType('timestamptz'))
        .execute()
      await schema
        .alterTable('pets')
        .alterColumn('birthday', (column) => column.setDefault(sql`now()`))
        .execute()
      await schema
        .alterTable('pets')
        .alterColumn('weight', (column) => column.setDefault(1))
        .execute()
      await schema.alterTable('pets').addCheckConstraint('light', sql`weight < 1000`).execute()
      await schema.alterTable('pets').dropConstraint('light').execute()
      await schema.alterTable('pets').dropColumn('birthday').execute()
      await schema.alterTable('pets').renameTo('beasts').execute()
      return (await sql`select 1 from beasts`.execute(db)).rows.length
    },
    4,
  ],
  'indexes, views, materialized views, types, schemas': [
    async (db) => {
      const { schema } = db
      await schema.createIndex('pets_species').on('pets').columns(['species', 'name desc']).unique().execute()
      await schema
        .createView('cats')
        .as(db.selectFrom('pets').selectAll().where('species', '=', sql.lit('cat')))
        .execute()
      await schema.createView('few').materialized().as(db.selectFrom('pets').select('name')).execute()
      await schema.refreshMaterializedView('few').execute()
      await schema.createType('mood').asEnum(['calm', 'wild']).execute()
      await schema.createSchema('elsewhere').execute()
      await schema.withSchema('elsewhere').createTable('pets').addColumn('name', 'text').execute()
      await db
        .withSchema('elsewhere')
        .insertInto('pets')
        .values({ name: 'far', species: 'x' } as never)
        .execute()
        .catch(() => {})
      return await sql`select count(*)::int as n from pg_type where typname = 'mood'`
        .execute(db)
        .catch((error: Error) => [error.name])
    },
    ['error'],
  ],
  'drops, with what hangs on them': [
    async (db) => {
      await db.schema.createView('everybody').as(db.selectFrom('people').selectAll()).execute()
      await db.schema.dropView('everybody').execute()
      await db.schema.dropTable('people').cascade().execute()
      await db.schema.dropTable('nothing').ifExists().execute()
      return (await db.introspection.getTables()).map(({ name }) => name)
    },
    ['pets'],
  ],
})
