import { Kysely, PostgresDialect, sql, type Transaction } from 'kysely'
import pg from 'pg'
import { type Contender, POOL_SIZE } from '../contender.ts'
import type { Item } from '../items.ts'
import type { Schema } from '../schema.ts'

/** Kysely over `pg`, with `db.transaction().execute`. */
const overPg: Contender = async (app, { connectionString }) => {
  const pool = new pg.Pool({ connectionString, max: POOL_SIZE, idleTimeoutMillis: 0 })
  pool.on('error', (error) => app.log.error(error))
  const db = new Kysely<Schema>({ dialect: new PostgresDialect({ pool }) })
  app.addHook('onClose', () => db.destroy())

  const selectItem = (trx: Transaction<Schema>, id: number) =>
    trx.selectFrom('items').select(['id', 'name', 'price']).where('id', '=', id).executeTakeFirstOrThrow()

  return {
    read: (id) => db.transaction().execute((trx) => selectItem(trx, id)),
    update: (id) =>
      db.transaction().execute(async (trx) => {
        const read = await trx.selectFrom('counts').select('count').where('id', '=', id).executeTakeFirstOrThrow()
        const updated = await trx
          .updateTable('counts')
          .set({ count: sql`count + 1` })
          .where('id', '=', id)
          .returning('count')
          .executeTakeFirstOrThrow()
        return { id, before: read.count, after: updated.count }
      }),
    insert: (entry) =>
      db.transaction().execute(async (trx) => {
        await trx.insertInto('entries').values(entry).execute()
      }),
    readAll: (ids) =>
      db.transaction().execute(async (trx) => {
        const items: Item[] = []
        // One client runs one statement at a time.
        for (const id of ids) items.push(await selectItem(trx, id))
        return items
      }),
    hold: (id, somethingElse) =>
      db.transaction().execute(async (trx) => {
        const item = await selectItem(trx, id)
        await somethingElse()
        return item
      }),
  }
}

export default overPg
