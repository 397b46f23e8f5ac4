import postgres from 'postgres'
import { type Contender, POOL_SIZE } from '../contender.ts'
import type { Item } from '../items.ts'

/** `postgres` with `begin`. It prepares its statements, which is its default. */
const withBegin: Contender = async (app, { connectionString }) => {
  const sql = postgres(connectionString, { max: POOL_SIZE })
  app.addHook('onClose', () => sql.end())

  async function selectItem(tx: postgres.TransactionSql, id: number): Promise<Item> {
    const [item] = await tx<Item[]>`select id, name, price from items where id = ${id}`
    return item!
  }

  return {
    read: (id) => sql.begin((tx) => selectItem(tx, id)),
    update: (id) =>
      sql.begin(async (tx) => {
        const [read] = await tx<{ count: number }[]>`select count from counts where id = ${id}`
        const [updated] = await tx<{ count: number }[]>`
          update counts set count = count + 1 where id = ${id} returning count`
        return { id, before: read!.count, after: updated!.count }
      }),
    insert: async ({ item, note }) => {
      await sql.begin((tx) => tx`insert into entries (item, note) values (${item}, ${note})`)
    },
    // It sends them one behind the other without waiting for answers.
    readAll: (ids) => sql.begin((tx) => Promise.all(ids.map((id) => selectItem(tx, id)))),
    hold: (id, somethingElse) =>
      sql.begin(async (tx) => {
        const item = await selectItem(tx, id)
        await somethingElse()
        return item
      }),
  }
}

export default withBegin
