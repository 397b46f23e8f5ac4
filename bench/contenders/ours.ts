import requestDb, { type RequestDbOptions, type Session } from 'fastify-request-db'
import { sql } from 'kysely'
import { type Contender, POOL_SIZE } from '../contender.ts'
import type { Schema } from '../schema.ts'

declare module 'fastify-request-db' {
  interface DatabaseSchema extends Schema {}
}

/** This plugin. Its transaction begins with the first statement, and ends with the request. */
const ours: Contender = async (app, { connectionString, options }) => {
  const { pool, ...others }: RequestDbOptions = options
  await app.register(requestDb, { connectionString, pool: { size: POOL_SIZE, ...pool }, ...others })

  const selectItem = (db: Session, id: number) =>
    db.selectFrom('items').select(['id', 'name', 'price']).where('id', '=', id).executeTakeFirstOrThrow()

  return {
    read: (id, { db }) => selectItem(db, id),
    update: async (id, { db }) => {
      const read = await db.selectFrom('counts').select('count').where('id', '=', id).executeTakeFirstOrThrow()
      const updated = await db
        .updateTable('counts')
        .set({ count: sql`count + 1` })
        .where('id', '=', id)
        .returning('count')
        .executeTakeFirstOrThrow()
      return { id, before: read.count, after: updated.count }
    },
    insert: async (entry, { db }) => db.add(db.insertInto('entries').values(entry)),
    readAll: (ids, { db }) => Promise.all(ids.map((id) => selectItem(db, id))),
    hold: async (id, somethingElse, { db }) => {
      const item = await selectItem(db, id)
      await somethingElse()
      return item
    },
  }
}

export default ours
