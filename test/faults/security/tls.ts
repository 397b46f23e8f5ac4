import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { type AddressInfo, connect, createServer } from 'node:net'
import { join } from 'node:path'
import type { ConnectionOptions } from 'node:tls'
import { sql } from 'kysely'
import type { ClientConfig } from 'pg'
import { buildApp } from '../../support/app.ts'
import { makeCertificate } from '../../support/certificate.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { openHttp } from '../../support/http-client.ts'
import { pidOf } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { t, test } from '../../support/test.ts'
import { startTlsProxy } from '../../support/tls-proxy.ts'

/* Who is at the other end of the connection is made sure of, for sessions and for cancel requests alike. */

const database = await createDatabase(t, { sql: NOTES })
const { username: user, password, pathname } = new URL(database.connectionString)

/** `verify-full` in Node's words: a CA is given, and the name is looked at. */
const through = (port: number, ssl: ConnectionOptions | boolean, host = 'localhost'): ClientConfig => ({
  host,
  port,
  user,
  password,
  database: pathname.slice(1),
  ssl,
})

test('the right certificate for the right name is let in', async (t) => {
  const { port, cert, counts } = await startTlsProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connection: through(port, { ca: cert }) })
  await app.db.ping()
  t.equal(counts.secure, 1)
})

for (const [what, ssl, host, code] of [
  ['of another authority', { ca: makeCertificate().cert }, 'localhost', 'DEPTH_ZERO_SELF_SIGNED_CERT'],
  ['for another name', {}, '127.0.0.1', 'ERR_TLS_CERT_ALTNAME_INVALID'],
] as const) {
  test(`a certificate ${what} is UNAVAILABLE, and the client hears nothing of the reason`, async (t) => {
    const { port, cert } = await startTlsProxy(t, database.connectionString)
    const connection = through(port, { ca: cert, ...ssl }, host)
    const app = await buildApp(t, database, { connection }, (app) => {
      app.get('/', ({ db }) => pidOf(db))
    })
    await t.rejects(app.db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE', cause: { code } })
    const answer = await app.inject('/')
    t.equal(answer.statusCode, 503)
    t.notMatch(answer.body, /cert|altname|localhost|127\.0/i)
    t.match(app.db.snapshot(), { open: 0, checkedOut: 0 })
  })
}

test('a server that does not speak TLS is UNAVAILABLE, not spoken to in the clear', async (t) => {
  const { port } = new URL(database.connectionString)
  const app = await buildApp(t, database, { connection: through(Number(port), { ca: makeCertificate().cert }) })
  await t.rejects(app.db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE', cause: { message: /SSL/ } })
  t.strictSame(await database.backends(), [])
})

test('sslmode=verify-full in the connection string verifies both', async (t) => {
  const { port, cert } = await startTlsProxy(t, database.connectionString)
  const file = join(t.testdir({}), 'root.crt')
  await writeFile(file, cert)
  const url = new URL(database.connectionString)
  url.port = String(port)
  url.searchParams.set('sslmode', 'verify-full')
  url.searchParams.set('sslrootcert', file)
  url.hostname = 'localhost'
  const good = await buildApp(t, database, { connectionString: url.href })
  await good.db.ping()
  url.hostname = '127.0.0.1'
  const bad = await buildApp(t, database, { connectionString: url.href })
  await t.rejects(bad.db.ping(), { code: 'FST_REQUEST_DB_UNAVAILABLE' })
})

test('a cancel request is not sent to somebody else who has taken the address', async (t) => {
  const real = await startTlsProxy(t, database.connectionString)
  const impostor = await startTlsProxy(t, database.connectionString)
  let target = real.port
  const between = createServer((socket) => {
    const onward = connect(target, '127.0.0.1')
    for (const side of [socket, onward]) side.on('error', () => {})
    socket.pipe(onward).pipe(socket)
  }).listen(0, '127.0.0.1')
  await once(between, 'listening')
  t.teardown(() => between.close())
  const { port } = between.address() as AddressInfo
  const connection = through(port, { ca: real.cert })
  const app = await buildApp(t, database, { connection, settleTimeoutMillis: 500 }, (app) => {
    app.get('/', async ({ db }) => {
      await sql`select pg_sleep(60)`.execute(db)
    })
  })
  const client = (await openHttp(t, app)).send('GET', '/')
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep(60)')))
  target = impostor.port
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.match(impostor.counts, { secure: 1, cancels: 0 }, 'it is asked for its certificate, and told nothing')
  t.match(app.db.snapshot().totals, { invalidated: 1 })
  for (const { pid } of await database.backends()) await database.query('select pg_terminate_backend($1)', [pid])
})
