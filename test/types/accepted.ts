// What must compile, as a user writes it, against the built package.
import Fastify, { type FastifyInstance, type FastifyPluginAsync, type FastifyReply, type FastifyRequest } from 'fastify'
import requestDb, {
  currentSession,
  type Database,
  type DatabaseSchema,
  type HolderSnapshot,
  listen,
  type Report,
  type RequestDbError,
  type RequestDbOptions,
  type RetryOptions,
  type RouteDbOptions,
  requestDb as requestDbByName,
  type Session,
  type SessionState,
  type Snapshot,
  type Totals,
} from 'fastify-request-db'
import requestDbDashboard, { type DashboardOptions } from 'fastify-request-db/dashboard'
import requestDbMetrics from 'fastify-request-db/metrics'
import requestDbOpenTelemetry from 'fastify-request-db/opentelemetry'
import { CamelCasePlugin, type Kysely, sql, type Transaction } from 'kysely'
import type pg from 'pg'
import './schema.ts'

/** Fails to compile unless the two types are the same. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : never
const same = <A, B>(_: Same<A, B>) => {}

const app: FastifyInstance = Fastify()

// The first example of the README, a variable that may be missing included.
await app.register(requestDb, {
  connectionString: process.env.DATABASE_URL,
  pool: { size: 16, maxOverflow: 4 },
})
app.post<{ Body: { note: string } }>('/trips', async (request, reply) => {
  reply.code(201)
  const trip = await request.db
    .insertInto('trips')
    .values({ note: request.body.note })
    .returningAll()
    .executeTakeFirstOrThrow()
  same<typeof trip, { id: number; note: string; booked_at: Date }>(true)
  return trip
})

// Every option, the forms that are left out included.
const options: RequestDbOptions = {
  connection: { host: '127.0.0.1', ssl: { rejectUnauthorized: true }, application_name: 'app' },
  pool: {
    size: 1,
    maxOverflow: 0,
    timeoutMillis: 0,
    maxWaiting: 0,
    recycleMillis: false,
    prePing: { idleMillis: 1000, timeoutMillis: 500 },
  },
  decorator: 'db',
  commitOn: 'onResponse',
  shouldCommit: (request: FastifyRequest, reply: FastifyReply) => request.method !== 'GET' && reply.statusCode < 400,
  isolationLevel: 'serializable',
  readOnly: (request) => request.method === 'GET',
  deferrable: true,
  settings: (request) => ({ 'app.tenant': request.id, 'app.level': 1, 'app.flag': true }),
  statementTimeoutMillis: 5000,
  settleTimeoutMillis: 2000,
  maxSessionMillis: 60_000,
  closeGraceMillis: 5000,
  resetOnReturn: 'discard',
  preparedStatements: { cacheSize: 50 },
  plugins: [new CamelCasePlugin()],
  echo: 'debug',
  echoPool: true,
  echoParameters: false,
  leakDetectionMillis: 10_000,
  processes: 4,
  capacityCheck: false,
  serverTiming: true,
}
await app.register(requestDb, options)
await app.register(requestDbByName, { connectionString: 'postgres://', pool: { prePing: false } })
await app.register(requestDb, () => ({ connectionString: 'postgres://', prefix: '/v1' }))
app.register(requestDb, { connectionString: 'postgres://', logLevel: 'warn', statementTimeoutMillis: false })

// What looks at the pool, each a plugin of its own.
const dashboard: DashboardOptions = { path: '/pool', allow: async (request) => request.headers.authorization === 'x' }
await app.register(requestDbDashboard, dashboard)
await app.register(requestDbMetrics, { path: '/metrics', decorator: 'db' })
await app.register(requestDbOpenTelemetry, { queryText: false, attributes: { 'db.namespace': 'trips' } })
const stop: () => void = listen(app.db.pool, {
  checkin: ({ who, heldMillis, busyMillis }) => void [who.route, heldMillis - busyMillis],
  statement: ({ text, error }) => void [text, error?.message],
})
stop()
app.setErrorHandler((error: RequestDbError, _request, reply) => {
  const report: Report | undefined = error.report
  same<typeof report, Report | undefined>(true)
  return reply.send(`${report?.verdict?.cause} ${report?.holders[0]?.route} ${report?.verdict?.routes.join()}`)
})

// A child scope, the route's own options, a shorthand and a HEAD route.
const child: FastifyPluginAsync = async (scope) => {
  scope.get('/report', { config: { db: { readOnly: true, isolationLevel: 'repeatable read' } } }, (request) =>
    request.db.selectFrom('trips').select(['id', 'note']).where('id', '>', 3).orderBy('id').execute(),
  )
  const route: RouteDbOptions = { autocommit: true, statementTimeoutMillis: false, commitOn: 'onSend' }
  scope.route({
    method: 'GET',
    url: '/vacuum',
    exposeHeadRoute: true,
    config: { db: route },
    handler: async () => 'ok',
  })
}
await app.register(child)

// A repository takes the session, or anything that is Kysely underneath.
async function rename(db: Session, id: number, note: string): Promise<void> {
  await db.updateTable('trips').set({ note }).where('id', '=', id).execute()
}
const count = (db: Kysely<DatabaseSchema>) => db.selectFrom('trips').select(db.fn.countAll<string>().as('n')).execute()

app.put('/everything', async ({ db }) => {
  same<typeof db, Session>(true)
  await rename(db, 1, 'x')
  const [counted] = await count(db)
  same<typeof counted, { n: string } | undefined>(true)
  db.add(db.insertInto('trips').values({ note: 'later' }))
  db.add(sql`notify trips`.$castTo<object>() && db.deleteFrom('trips').where('id', '=', 2))
  await db.flush()
  await db.begin()
  await db.commit()
  await db.rollback()
  db.afterCommit(() => {})
  db.afterCommit(async () => {})
  db.afterRollback(() => {})
  const state: SessionState = db.state
  const isOpen: boolean = db.inTransaction
  const nested = await db.transaction().execute(async (trx) => {
    const isTransaction: Transaction<DatabaseSchema> = trx
    await isTransaction.insertInto('trips').values({ note: 'n', booked_at: '2026-01-01' }).execute()
    return 7 as const
  })
  same<typeof nested, 7>(true)
  const rows = await db.withClient(async (client: pg.Client) => (await client.query('select 1')).rowCount)
  same<typeof rows, number | null>(true)
  for await (const trip of db.selectFrom('trips').selectAll().stream(100)) same<typeof trip.note, string>(true)
  const widened = await db.withTables<{ seats: { free: number } }>().selectFrom('seats').select('free').execute()
  same<typeof widened, { free: number }[]>(true)
  await db.withSchema('billing').selectFrom('billing.invoices').select('cents').execute()
  await db.withoutPlugins().withPlugin(new CamelCasePlugin()).flush()
  const one = await sql<{ one: number }>`select 1 as one`.execute(db)
  same<typeof one.rows, { one: number }[]>(true)
  return { state, isOpen }
})

// fastify.db
const database: Database<DatabaseSchema> = app.db
const kept = await database.session(async (db) => {
  same<typeof db, Session>(true)
  return 'kept'
})
same<typeof kept, string>(true)
await database.session(
  { name: 'nightly', readOnly: true, isolationLevel: 'serializable', deferrable: true, settings: { 'app.tenant': 1 } },
  async (db) => db.selectFrom('trips').selectAll().execute(),
)
await database.session({ autocommit: true, statementTimeoutMillis: false }, async () => {})
const snapshot: Snapshot = app.db.snapshot()
const holder: HolderSnapshot | undefined = snapshot.holders[0]
const totals: Readonly<Totals> = snapshot.totals
same<typeof snapshot.checkedOut, number>(true)
same<Awaited<ReturnType<typeof database.ping>>, number>(true)
await database.kysely.selectFrom('trips').selectAll().execute()

// A second database, by another decorator, is declared by the one who registers it.
interface Archive {
  entries: { id: number }
}
declare module 'fastify' {
  interface FastifyInstance {
    archive: Database<Archive>
  }
  interface FastifyRequest {
    readonly archive: Session<Archive>
  }
}
await app.register(requestDb, { connectionString: 'postgres://', decorator: 'archive' })
app.get('/archive', (request) => request.archive.selectFrom('entries').select('id').execute())

// A session found rather than handed over.
const found = () => currentSession()
same<ReturnType<typeof found>, Session>(true)
const repository = (db: Kysely<DatabaseSchema>) => db.selectFrom('trips').selectAll().execute()
const read = () => repository(currentSession())
const archived = () => currentSession<Archive>('archive').selectFrom('entries').select('id').execute()

// Attempts, signals, deadlines, remembered reads.
const retry: RetryOptions = { attempts: 5, on: ['40001', 'CONNECTION_LOST'] }
app.get('/retried', { config: { db: { retry, isolationLevel: 'serializable' } } }, async ({ db }) => {
  const trips = await db.remember(db.selectFrom('trips').select('note'))
  same<typeof trips, { note: string }[]>(true)
  const raw = await db.remember(sql<{ one: number }>`select 1 as one`.compile(db))
  same<typeof raw, { one: number }[]>(true)
})
app.get('/unrepeated', { config: { db: { retry: false } } }, async () => {})
await app.db.session(
  { signal: AbortSignal.timeout(1000), deadlineMillis: 5000, retry: { on: (error: Error) => error.name === 'x' } },
  async () => {},
)

app.setErrorHandler((error: RequestDbError, _request, reply) => {
  if (error.retryable && error.code === 'FST_REQUEST_DB_POOL_TIMEOUT') reply.headers(error.headers ?? {})
  reply.code(error.statusCode ?? 500).send(error)
})

export { archived, holder, read, totals }
