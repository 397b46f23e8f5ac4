// What must not compile: each line below a `@ts-expect-error` is a mistake the types have to catch.
import Fastify from 'fastify'
import requestDb, { type RequestDbOptions, type Session, type Snapshot } from 'fastify-request-db'
import './schema.ts'

const app = Fastify()
const connectionString = 'postgres://'

// @ts-expect-error an unknown option
const unknown: RequestDbOptions = { connectionString, poolSize: 5 }
// @ts-expect-error an unknown option of the pool
const unknownOfPool: RequestDbOptions = { connectionString, pool: { max: 5 } }
// @ts-expect-error retry is an option of routes and jobs
const retry: RequestDbOptions = { connectionString, retry: { attempts: 3 } }
// @ts-expect-error a size is a number
const text: RequestDbOptions = { connectionString, pool: { size: '5' } }
// @ts-expect-error one of two words
const mode: RequestDbOptions = { connectionString, commitOn: 'onFinish' }
// @ts-expect-error one of four levels
const level: RequestDbOptions = { connectionString, isolationLevel: 'snapshot' }
// @ts-expect-error the plugin has no autocommit, routes have
const autocommit: RequestDbOptions = { connectionString, autocommit: true }
// @ts-expect-error a setting is no object
const settings: RequestDbOptions = { connectionString, settings: () => ({ 'app.tenant': { id: 1 } }) }
// @ts-expect-error true is not a ping's options
const ping: RequestDbOptions = { connectionString, pool: { prePing: true } }
// @ts-expect-error
await app.register(requestDb, { connectionString, sizes: 1 })

// Fastify infers the rest of `config`, so an unknown name there is refused at register only; a wrong value is seen here.
// @ts-expect-error one of two words
app.get('/1', { config: { db: { commitOn: 'never' } } }, async () => 'x')
// @ts-expect-error true or false
app.get('/2', { config: { db: { autocommit: 'yes' } } }, async () => 'x')

app.get('/', async ({ db }) => {
  // @ts-expect-error no such table
  await db.selectFrom('trip').selectAll().execute()
  // @ts-expect-error no such column
  await db.selectFrom('trips').select('notes').execute()
  // @ts-expect-error a column of the wrong type
  await db.insertInto('trips').values({ note: 1 }).execute()
  // @ts-expect-error a column is missing
  await db.insertInto('trips').values({}).execute()
  // @ts-expect-error this column cannot be updated
  await db.updateTable('trips').set({ booked_at: '2026-01-01' }).execute()
  // @ts-expect-error add takes a query, not its result
  db.add(db.insertInto('trips').values({ note: 'x' }).execute())
  // @ts-expect-error add takes a query, not a text
  db.add('insert into trips default values')
  // @ts-expect-error a callback
  db.afterCommit('mail')
  // @ts-expect-error only the plugin knows the state
  db.state = 'idle'
  // @ts-expect-error
  if (db.state === 'open') throw new Error('no such state')
  // @ts-expect-error the session's life is not the handler's
  db.end()
  // @ts-expect-error
  await db.withClient((client) => client.nothing())
})
app.get('/db', async (request) => {
  // @ts-expect-error request.db is the plugin's
  request.db = app.db
})

// @ts-expect-error a session needs a function
await app.db.session({ readOnly: true })
// @ts-expect-error outside of a request there is nothing to decide by
await app.db.session({ readOnly: () => true }, async () => {})
// @ts-expect-error when to commit is a matter of requests
await app.db.session({ commitOn: 'onSend' }, async () => {})
// @ts-expect-error an AbortController is not its signal
await app.db.session({ signal: new AbortController() }, async () => {})
// @ts-expect-error codes are a list, or a rule
await app.db.session({ retry: { on: '40001' } }, async () => {})
// @ts-expect-error what is remembered is a query
await app.db.session((db) => db.remember('select 1'))
// @ts-expect-error the tables of another database
const session: Session<{ other: { id: number } }> = await app.db.session(async (db) => db)
// @ts-expect-error a snapshot is read
;(app.db.snapshot() as Snapshot).waiting = 0
// @ts-expect-error what the pool does is the plugin's business
app.db.pool.close()

export { autocommit, level, mode, ping, retry, session, settings, text, unknown, unknownOfPool }
