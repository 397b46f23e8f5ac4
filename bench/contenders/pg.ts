import pg from 'pg'
import { type Contender, POOL_SIZE } from '../contender.ts'
import type { Item } from '../items.ts'

/** `pg` by hand. With `named: true` its statements are prepared once on each connection. */
const handWritten: Contender = async (app, { connectionString, options }) => {
  const pool = new pg.Pool({ connectionString, max: POOL_SIZE, idleTimeoutMillis: 0 })
  pool.on('error', (error) => app.log.error(error))
  app.addHook('onClose', () => pool.end())

  async function transaction<T>(work: (client: pg.PoolClient) => Promise<T>): Promise<T> {
    const client = await pool.connect()
    let broken: Error | undefined
    try {
      await client.query('BEGIN')
      const result = await work(client)
      await client.query('COMMIT')
      return result
    } catch (error) {
      await client.query('ROLLBACK').catch((reason: Error) => {
        broken = reason
      })
      throw error
    } finally {
      client.release(broken)
    }
  }

  const statement = (name: string, text: string) => (options.named ? { name, text } : { text })
  const SELECT_ITEM = statement('select item', 'select id, name, price from items where id = $1')
  const SELECT_COUNT = statement('select count', 'select count from counts where id = $1')
  const ADD_ONE = statement('add one', 'update counts set count = count + 1 where id = $1 returning count')
  const INSERT_ENTRY = statement('insert entry', 'insert into entries (item, note) values ($1, $2)')

  async function selectItem(client: pg.PoolClient, id: number): Promise<Item> {
    const { rows } = await client.query<Item>({ ...SELECT_ITEM, values: [id] })
    return rows[0]!
  }

  return {
    read: (id) => transaction((client) => selectItem(client, id)),
    update: (id) =>
      transaction(async (client) => {
        const read = await client.query<{ count: number }>({ ...SELECT_COUNT, values: [id] })
        const updated = await client.query<{ count: number }>({ ...ADD_ONE, values: [id] })
        return { id, before: read.rows[0]!.count, after: updated.rows[0]!.count }
      }),
    insert: ({ item, note }) =>
      transaction(async (client) => {
        await client.query({ ...INSERT_ENTRY, values: [item, note] })
      }),
    readAll: (ids) =>
      transaction(async (client) => {
        const items: Item[] = []
        // One client runs one statement at a time.
        for (const id of ids) items.push(await selectItem(client, id))
        return items
      }),
    hold: (id, somethingElse) =>
      transaction(async (client) => {
        const item = await selectItem(client, id)
        await somethingElse()
        return item
      }),
  }
}

export default handWritten
