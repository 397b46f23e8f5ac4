import { sql } from 'kysely'
import type { ClientConfig } from 'pg'
import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { add, notesIn, pidOf } from '../support/notebook.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'
import { startTlsProxy } from '../support/tls-proxy.ts'

const database = await createDatabase(t, { sql: NOTES })
t.afterEach(async () => void (await database.query('delete from notes')))
const { username: user, password, pathname } = new URL(database.connectionString)

for (const sslNegotiation of ['postgres', 'direct']) {
  test(`sessions and cancels go through TLS, negotiated as '${sslNegotiation}'`, async (t) => {
    const { port, cert, counts } = await startTlsProxy(t, database.connectionString)
    const connection = {
      host: 'localhost',
      port,
      user,
      password,
      database: pathname.slice(1),
      ssl: { ca: cert, servername: 'localhost', ALPNProtocols: ['postgresql'] },
      sslnegotiation: sslNegotiation,
    } as ClientConfig
    const asleep = gate()
    const app = await buildApp(t, database, { connection, pool: { size: 1 } }, (app) => {
      app.post('/', async ({ db }) => {
        await add(db, 'kept')
        return pidOf(db)
      })
      app.post('/sleep', async ({ db }) => {
        await add(db, 'lost')
        asleep.open()
        await sql`select pg_sleep(30)`.execute(db)
      })
    })
    const { body: pid, statusCode } = await app.inject({ method: 'POST', url: '/' })
    t.equal(statusCode, 200, pid)
    const client = (await openHttp(t, app)).send('POST', '/sleep')
    await asleep.opened
    await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep(30)')))
    client.destroy()
    await eventually(() => app.db.snapshot().checkedOut === 0)
    t.strictSame(counts, { secure: 2, cancels: 1 })
    t.equal((await app.inject({ method: 'POST', url: '/' })).body, pid, 'the connection is used again')
    t.strictSame(await notesIn(database), ['kept', 'kept'])
  })
}

test('a certificate that is not trusted is UNAVAILABLE, and the reason is the cause', async (t) => {
  const { port } = await startTlsProxy(t, database.connectionString)
  const connection = { host: 'localhost', port, user, password, database: pathname.slice(1), ssl: true }
  const app = await buildApp(t, database, { connection })
  await t.rejects(app.db.ping(), {
    code: 'FST_REQUEST_DB_UNAVAILABLE',
    cause: { code: 'DEPTH_ZERO_SELF_SIGNED_CERT' },
  })
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0 })
})
