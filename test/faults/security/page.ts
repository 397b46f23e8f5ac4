import type { FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import requestDbDashboard from '../../../lib/dashboard.ts'
import requestDbMetrics from '../../../lib/metrics.ts'
import { buildApp } from '../../support/app.ts'
import { findChromium, openBrowser, openPage } from '../../support/browser.ts'
import { createDatabase } from '../../support/database.ts'
import { gate } from '../../support/gate.ts'
import { listen, openHttp } from '../../support/http-client.ts'
import { openHttp2 } from '../../support/http2-client.ts'
import { type Test, t, test } from '../../support/test.ts'

/* Who gets at the page and the metrics, by what road, and what they can put on it. */

const executablePath = findChromium()
const database = await createDatabase(t, {})
const browser = executablePath && (await openBrowser(t, executablePath))

const withPage = async (app: FastifyInstance) => {
  await app.register(requestDbDashboard, { path: '/pool', intervalMillis: 100 })
}

const DETOURS = [
  '/pool/../package.json',
  '/pool/..%2f..%2fpackage.json',
  '/pool/%2e%2e/%2e%2e/package.json',
  '/pool/....//package.json',
  '/pool/..\\files.ts',
  '/pool/page%00.js',
  '/pool/page.js/../../files.ts',
  '/pool//page.js',
  '/pool/page.html',
  '/pool/files.js',
  '/pool/page.js.map',
  '/pool/%2fetc%2fpasswd',
  '/pool/__proto__',
  '/pool/constructor',
]

test('no road leads to a file that is not the page’s own', async (t) => {
  const app = await buildApp(t, database, {}, withPage)
  for (const path of DETOURS) {
    const client = await openHttp(t, app)
    const { status, body } = await client.send('GET', path).response()
    t.match(status, /^40[04]$/, path)
    t.notMatch(body, /root:|"dependencies"|readFileSync/)
  }
  t.equal((await app.inject('/pool')).statusCode, 200)
})

test('the page is read only: other methods are not there', async (t) => {
  const app = await buildApp(t, database, {}, withPage)
  for (const method of ['POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE'] as const) {
    for (const url of ['/pool', '/pool/events', '/pool/page.js']) {
      t.equal((await app.inject({ method, url })).statusCode, 404, `${method} ${url}`)
    }
  }
})

test('a page of another site, in a browser on this machine, gets nothing, whatever CORS the app has', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    app.addHook('onRequest', async (_request, reply) => void reply.header('access-control-allow-origin', '*'))
    await withPage(app)
  })
  const status = async (headers: Record<string, string>, url = '/pool/events') => {
    const client = await openHttp(t, app)
    client.send('GET', url, { headers: { host: 'localhost:80', ...headers } })
    await client.receives('\r\n\r\n')
    client.destroy()
    return Number(client.received.split(' ')[1])
  }
  const foreign = { 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'cors' }
  t.equal(await status({ origin: 'https://evil.example', ...foreign }), 403)
  t.equal(await status({ origin: 'https://evil.example' }), 403, 'an old browser')
  t.equal(await status({ origin: 'null' }), 403, 'a sandboxed frame')
  t.equal(await status({ origin: 'http://localhost:8080', 'sec-fetch-site': 'same-site' }), 403, 'another app here')
  t.equal(await status({ 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'no-cors' }, '/pool/page.js'), 403)
  t.equal(await status({ 'sec-fetch-site': 'cross-site', 'sec-fetch-mode': 'navigate' }, '/pool'), 200, 'a link')
  t.equal(await status({ 'sec-fetch-site': 'same-origin', 'sec-fetch-mode': 'cors' }), 200, 'itself')
  t.equal(await status({ origin: 'http://localhost:80' }), 200, 'itself, in an old browser')
  t.equal(await status({ 'sec-fetch-site': 'none', 'sec-fetch-mode': 'navigate' }, '/pool'), 200, 'typed in')
})

test('a proxy that says nothing of itself, and speaks HTTP/1.0 as nginx did, is one', async (t) => {
  const app = await buildApp(t, database, {}, withPage)
  const ask = async (head: string) => {
    const client = await openHttp(t, app)
    client.socket.write(`${head}\r\nconnection: close\r\n\r\n`)
    await client.receives('\r\n\r\n')
    return client.received
  }
  t.match(await ask('GET /pool HTTP/1.0\r\nhost: 127.0.0.1:3000'), /^HTTP\/1\.1 403/)
  t.match(await ask('GET /pool HTTP/1.0'), /^HTTP\/1\.1 403/)
  t.match(await ask('GET /pool HTTP/1.1\r\nhost: 127.0.0.1:3000'), /^HTTP\/1\.1 200/)
  t.match(await ask('GET http://evil.example/pool HTTP/1.1\r\nhost: evil.example'), /^HTTP\/1\.1 40[34]/)
})

test('over HTTP/2 the authority is the host', async (t) => {
  const app = await buildApp(t, database, {}, withPage, { http2: true })
  const { session } = await openHttp2(t, app)
  const status = (headers: Record<string, string>) =>
    new Promise((resolve) => {
      session.request({ ':path': '/pool', ...headers }).on('response', (head) => resolve(head[':status']))
    })
  t.equal(await status({}), 200)
  t.equal(await status({ ':authority': 'evil.example' }), 403)
  t.equal(await status({ 'x-forwarded-for': '127.0.0.1' }), 403)
})

test('what refuses is as little of a page as what is shown', async (t) => {
  const app = await buildApp(t, database, {}, withPage)
  const { headers, body } = await app.inject({ url: '/pool', headers: { host: '<script>alert(1)</script>' } })
  t.match(headers, { 'content-type': 'text/plain; charset=utf-8', 'cache-control': 'no-store' })
  t.notMatch(body, /<script>/)
  for (const url of ['/pool', '/pool/page.js']) {
    t.equal((await app.inject(url)).headers['cross-origin-resource-policy'], 'same-origin')
  }
})

test('metrics are served nowhere, unless a path is given, and say names and numbers only', async (t) => {
  const app = await buildApp(t, database, {}, async (app) => {
    const { Registry } = await import('prom-client')
    await app.register(requestDbMetrics, { registry: new Registry() })
    const served = new Registry()
    app.get('/select/:id', async ({ db }) => (await sql`select ${'parameter-4711'}::text`.execute(db)).rows)
    await app.register(async (scope) => {
      await scope.register(requestDbMetrics, { registry: served, path: '/metrics' })
    })
  })
  await app.inject('/select/1')
  t.equal((await app.inject('/')).statusCode, 404)
  const { body } = await app.inject('/metrics')
  t.match(body, /pool_name="db"/)
  t.notMatch(body, /select|4711|127\.0\.0\.1|postgres:/)
})

const HOSTILE = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'

/** Everything that can get onto the page, made of markup. */
async function hostile(t: Test) {
  const held = gate()
  const released = gate()
  t.teardown(() => released.open())
  const pool = { size: 1, timeoutMillis: 5000 }
  const routes = async (app: FastifyInstance) => {
    await withPage(app)
    app.get(`/${HOSTILE.replaceAll('/', '')}`, async ({ db }) => {
      await sql`select ${sql.raw(`'${HOSTILE}'`)}::text as "${sql.raw(HOSTILE.replaceAll('"', ''))}"`.execute(db)
      held.open()
      await released.opened
      return {}
    })
  }
  const app = await buildApp(t, database, { pool }, routes, { requestIdHeader: 'x-request-id' })
  const url = `/${encodeURI(HOSTILE.replaceAll('/', ''))}`
  return { app, url, held, released }
}

async function stays(t: Test) {
  const { app, url, held, released } = await hostile(t)
  const { page, complaints, origins } = await openPage(t, browser as Exclude<typeof browser, undefined | ''>)
  const base = `http://127.0.0.1:${await listen(app)}`
  await page.goto(`${base}/pool`)
  await page.locator('#word', { hasText: 'Room to spare' }).waitFor()
  const holder = app.inject({ url, headers: { 'x-request-id': HOSTILE } })
  await held.opened
  const refused = [app.inject(url), app.db.session({ name: HOSTILE }, (db) => sql`select 1`.execute(db))]
  const outcomes = Promise.allSettled(refused)
  await page.locator('#lanes .text', { hasText: '<img src=x' }).first().waitFor()
  await page.locator('#waiters tbody tr', { hasText: '<script>window.pwned' }).first().waitFor()
  await page.locator('#report-list summary', { hasText: '<img src=x' }).first().waitFor()
  await outcomes
  released.open()
  await holder
  await page.locator('#routes tbody tr', { hasText: '<img src=x' }).first().waitFor()
  t.equal(await page.evaluate('window.pwned'), undefined)
  t.equal(await page.evaluate('document.querySelectorAll("img, body script:not([src])").length'), 0)
  t.strictSame(complaints, [])
  t.strictSame([...origins], [base])
}

if (browser) test('markup in routes, SQL, names and request ids stays text on the page', stays)
else t.skip('markup stays text on the page (no Chromium: install it, or say where it is in CHROMIUM_PATH)', () => {})
