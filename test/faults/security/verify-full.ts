import { once } from 'node:events'
import { writeFile } from 'node:fs/promises'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { sql } from 'kysely'
import { buildApp } from '../../support/app.ts'
import { makeCertificate } from '../../support/certificate.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { openHttp } from '../../support/http-client.ts'
import { pidOf } from '../../support/notebook.ts'
import { NOTES } from '../../support/schema.ts'
import { type Test, t, test } from '../../support/test.ts'
import { startTlsProxy } from '../../support/tls-proxy.ts'

/* `sslmode=verify-full` in the connection string, as most write it: of sessions, cancels, and the plugin's own questions. */

const database = await createDatabase(t, { sql: NOTES })

/** The connection string with `port` in it, and the certificate in a file. */
async function verifying(t: Test, port: number, cert?: string): Promise<string> {
  const url = Object.assign(new URL(database.connectionString), { hostname: 'localhost', port: String(port) })
  url.searchParams.set('sslmode', 'verify-full')
  if (cert === undefined) return url.href
  const file = join(t.testdir({}), 'root.crt')
  await writeFile(file, cert)
  url.searchParams.set('sslrootcert', file)
  return url.href
}

async function isRefused(t: Test, connectionString: string): Promise<void> {
  // The question whether the server has room is asked over a connection of its own.
  const app = await buildApp(t, database, { connectionString, capacityCheck: true }, (app) => {
    app.get('/', ({ db }) => pidOf(db))
  })
  const { statusCode, json } = await app.inject('/')
  t.equal(statusCode, 503)
  t.equal(json().code, 'FST_REQUEST_DB_UNAVAILABLE')
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  t.strictSame(await database.backends(), [], 'nobody has got through to the server')
}

test('sessions, cancels and the check of the server’s room all go through the verified TLS', async (t) => {
  const { port, cert, counts } = await startTlsProxy(t, database.connectionString)
  const options = { connectionString: await verifying(t, port, cert), capacityCheck: true }
  const app = await buildApp(t, database, options, (app) => {
    app.get('/', async ({ db }) => void (await sql`select pg_sleep(60)`.execute(db)))
  })
  const client = (await openHttp(t, app)).send('GET', '/')
  await eventually(async () => (await database.backends()).some(({ query }) => query.includes('pg_sleep(60)')))
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
  t.match(counts, { cancels: 1 })
  t.ok(counts.secure >= 3, 'the session, its cancel and the check')
})

for (const [what, trusted] of [
  ['of another authority', makeCertificate().cert],
  ['that no known authority has signed', undefined],
] as const) {
  test(`a server with a certificate ${what} gets no password`, async (t) => {
    const { port } = await startTlsProxy(t, database.connectionString)
    await isRefused(t, await verifying(t, port, trusted))
  })
}

for (const [what, reply] of [
  ['speaks no TLS', 'N'],
  ['answers with an error', 'E'],
  ['puts words of its own in front of TLS', 'SR\0\0\0\x08\0\0\0\0'],
] as const) {
  test(`a server that ${what} is told nothing in the clear`, async (t) => {
    const heard: Buffer[] = []
    const server = createServer((socket) => {
      socket.on('error', () => {})
      socket.once('data', () => socket.write(reply))
      socket.on('data', (chunk) => heard.push(chunk))
    }).listen(0, '127.0.0.1')
    await once(server, 'listening')
    t.teardown(() => server.close())
    const { port } = server.address() as AddressInfo
    await isRefused(t, await verifying(t, port, makeCertificate().cert))
    const said = Buffer.concat(heard).toString('latin1')
    const { username, password } = new URL(database.connectionString)
    for (const word of [username, password || '\0user\0', database.name]) t.notOk(said.includes(word))
  })
}
