import fastifyPostgres from '@fastify/postgres'
import type { PoolClient } from 'pg'
import { type Contender, POOL_SIZE } from '../contender.ts'
import type { Item } from '../items.ts'

/** `@fastify/postgres` with `transact`. */
const withTransact: Contender = async (app, { connectionString }) => {
  await app.register(fastifyPostgres, { connectionString, max: POOL_SIZE, idleTimeoutMillis: 0 })
  app.pg.pool.on('error', (error) => app.log.error(error))

  async function selectItem(client: PoolClient, id: number): Promise<Item> {
    const { rows } = await client.query<Item>('select id, name, price from items where id = $1', [id])
    return rows[0]!
  }

  return {
    read: (id) => app.pg.transact((client) => selectItem(client, id)),
    update: (id) =>
      app.pg.transact(async (client) => {
        const read = await client.query<{ count: number }>('select count from counts where id = $1', [id])
        const text = 'update counts set count = count + 1 where id = $1 returning count'
        const updated = await client.query<{ count: number }>(text, [id])
        return { id, before: read.rows[0]!.count, after: updated.rows[0]!.count }
      }),
    insert: ({ item, note }) =>
      app.pg.transact(async (client) => {
        await client.query('insert into entries (item, note) values ($1, $2)', [item, note])
      }),
    readAll: (ids) =>
      app.pg.transact(async (client) => {
        const items: Item[] = []
        // One client runs one statement at a time.
        for (const id of ids) items.push(await selectItem(client, id))
        return items
      }),
    hold: (id, somethingElse) =>
      app.pg.transact(async (client) => {
        const item = await selectItem(client, id)
        await somethingElse()
        return item
      }),
  }
}

export default withTransact
