import { channel } from 'node:diagnostics_channel'
import Fastify, { type FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import requestDbDashboard, { type DashboardOptions } from '../lib/dashboard.ts'
import * as channels from '../lib/observe/channels.ts'
import type { Report } from '../lib/observe/report.ts'
import { buildApp } from './support/app.ts'
import { createDatabase } from './support/database.ts'
import { eventually } from './support/eventually.ts'
import { gate } from './support/gate.ts'
import { type HttpClient, openHttp } from './support/http-client.ts'
import { type Test, t, test } from './support/test.ts'

const database = await createDatabase(t, {})

const withPage = (
  t: Test,
  options: Partial<DashboardOptions> = {},
  routes: (app: FastifyInstance) => void = () => {},
) =>
  buildApp(t, database, { pool: { size: 2, timeoutMillis: 50 } }, async (app) => {
    await app.register(requestDbDashboard, { path: '/pool', ...options })
    routes(app)
  })

const isListenedTo = () =>
  [channels.checkout, channels.checkin, channels.close, channels.invalidate, channels.wait, channels.statement].some(
    ({ hasSubscribers }) => hasSubscribers,
  )

const report = (over: Partial<Report> = {}): Report => ({
  at: new Date(0).toISOString(),
  pool: 'db',
  code: 'FST_REQUEST_DB_POOL_TIMEOUT',
  size: 2,
  maxOverflow: 0,
  timeoutMillis: 50,
  open: 2,
  idle: 0,
  checkedOut: 2,
  waiting: 1,
  holders: [],
  waiters: [],
  verdict: undefined,
  ...over,
})

test('the page and its files come with headers that let in nothing from elsewhere', async (t) => {
  const app = await withPage(t)
  for (const path of ['/pool', '/pool/', '/pool/page.css', '/pool/page.js', '/pool/icon.svg']) {
    const { statusCode, headers } = await app.inject(path)
    t.equal(statusCode, 200, path)
    t.match(headers, {
      'content-security-policy': /^default-src 'none'; script-src 'self'; .*frame-ancestors 'none'$/,
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
      'referrer-policy': 'no-referrer',
    })
  }
  t.match((await app.inject('/pool?x=1')).body, '<base href="./pool/">')
  t.match((await app.inject('/pool/?x=/y')).body, '<base href="./">')
  t.equal(app.db.snapshot().totals.checkouts, 0, 'the page takes no connection')
})

test('every file that the page names is served', async (t) => {
  const app = await withPage(t, { path: '/' })
  const { body } = await app.inject('/')
  const names = Array.from(body.matchAll(/(?:href|src)="(\w[^"]+)"/g), ([, name]) => name)
  const { body: script } = await app.inject('/page.js')
  names.push(...Array.from(script.matchAll(/from '\.\/([^']+)'/g), ([, name]) => name))
  t.ok(names.length > 6)
  for (const name of names) t.equal((await app.inject(`/${name}`)).statusCode, 200, `${name}`)
})

test('a Fastify that ignores slashes at the end, and a prefix, are no obstacle', async (t) => {
  const routes = async (app: FastifyInstance) => {
    await app.register(requestDbDashboard, { path: '/pool/', prefix: '/admin' } as DashboardOptions)
  }
  const app = await buildApp(t, database, {}, routes, { routerOptions: { ignoreTrailingSlash: true } })
  t.match((await app.inject('/admin/pool')).body, '<base href="./pool/">')
  t.match((await app.inject('/admin/pool/')).body, '<base href="./">')
  t.equal((await app.inject('/admin/pool/page.js')).statusCode, 200)
})

test('without allow the page is for the machine itself: by its peer, its name, and not through a proxy', async (t) => {
  const app = await withPage(t)
  const status = async (remoteAddress: string, headers: Record<string, string> = {}) =>
    (await app.inject({ url: '/pool', remoteAddress, headers })).statusCode
  for (const local of ['127.0.0.1', '127.0.0.2', '::1', '::ffff:127.0.0.1']) t.equal(await status(local), 200, local)
  for (const host of ['localhost', 'localhost:3000', '127.0.0.1:80', '[::1]:80']) {
    t.equal(await status('127.0.0.1', { host }), 200, host)
  }
  for (const far of ['10.0.0.1', '192.168.1.2', '::ffff:10.0.0.1', '2001:db8::1']) {
    t.equal(await status(far), 403, far)
    t.equal(await status(far, { 'x-forwarded-for': '127.0.0.1' }), 403)
  }
  for (const host of ['evil.example', 'localhost.evil.example', '127.0.0.1.evil.example', 'evil.example:80']) {
    t.equal(await status('127.0.0.1', { host }), 403, host)
  }
  for (const name of ['x-forwarded-for', 'forwarded', 'x-forwarded-host', 'x-real-ip', 'via']) {
    t.equal(await status('127.0.0.1', { [name]: '127.0.0.1' }), 403, name)
  }
  for (const path of ['/pool/page.js', '/pool/events', '/pool/']) {
    const { statusCode, body } = await app.inject({ url: path, remoteAddress: '10.0.0.1' })
    t.equal(statusCode, 403, path)
    t.match(body, 'Not for you')
  }
})

test('trustProxy makes nobody local', async (t) => {
  const routes = async (app: FastifyInstance) => void (await app.register(requestDbDashboard, { path: '/pool' }))
  const app = await buildApp(t, database, {}, routes, { trustProxy: true })
  const headers = { 'x-forwarded-for': '127.0.0.1', 'x-forwarded-host': 'localhost' }
  t.equal((await app.inject({ url: '/pool', remoteAddress: '10.0.0.1', headers })).statusCode, 403)
})

test('allow alone decides where it is given, and only true is yes', async (t) => {
  const answers: unknown[] = [true, false, Promise.resolve(true), Promise.resolve(false), 'yes', undefined]
  const app = await withPage(t, { allow: (() => answers.shift()) as () => boolean })
  for (const expected of [200, 403, 200, 403, 403, 403]) {
    const { statusCode } = await app.inject({
      url: '/pool',
      remoteAddress: '10.0.0.1',
      headers: { host: 'ops.example' },
    })
    t.equal(statusCode, expected)
  }
  const throwing = await withPage(t, {
    allow: () => {
      throw Object.assign(new Error('who are you?'), { statusCode: 401 })
    },
  })
  t.equal((await throwing.inject('/pool')).statusCode, 401)
})

test('wrong options are refused by name', async (t) => {
  const wrong: [object, RegExp][] = [
    [{}, /Option path: expected a path such as '\/db'.*, got nothing/],
    [{ path: 'pool' }, /Option path: .* got 'pool'/],
    [{ path: '/:id' }, /Option path/],
    [{ path: '/*' }, /Option path/],
    [{ path: 5 }, /Option path: .* got 5/],
    [{ path: '/pool', allow: true }, /Option allow: expected a function .* got true/],
    [{ path: '/pool', decorator: 'a b' }, /Option decorator: expected a name, got 'a b'/],
    [{ path: '/pool', decorator: 'orders' }, /Option decorator: expected the `decorator` of .* got 'orders'/],
    [{ path: '/pool', intervalMillis: 0 }, /Option intervalMillis: .* got 0/],
    [{ path: '/pool', alow: () => true }, /Option alow: expected one of path, .* got an unknown name/],
  ]
  for (const [options, message] of wrong) {
    const attempt = async () => void (await withPage(t, { path: undefined as unknown as string, ...options }))
    await t.rejects(attempt, { code: 'FST_REQUEST_DB_INVALID_OPTION', message })
  }
  const bare = Fastify()
  bare.register(requestDbDashboard, { path: '/pool' })
  await t.rejects(async () => void (await bare.ready()), /before this plugin/)
})

test('nothing is listened to but reports while no page is open', async (t) => {
  const app = await withPage(t)
  t.equal(isListenedTo(), false)
  t.equal(channels.report.hasSubscribers, true)
  const [first, second] = [await openHttp(t, app), await openHttp(t, app)]
  for (const client of [first, second]) {
    client.send('GET', '/pool/events')
    await client.receives('"pool":')
  }
  t.equal(isListenedTo(), true)
  first.destroy()
  second.destroy()
  await eventually(() => !isListenedTo())
  await app.close()
  t.equal(channels.report.hasSubscribers, false)
})

test('an update says what is held by whom, and who waits', async (t) => {
  const [held, released] = [gate(), gate()]
  const app = await withPage(t, { intervalMillis: 100 }, (app) => {
    app.get('/hold/:id', async (request) => {
      await sql`select ${'a secret'}::text as held`.execute(request.db)
      held.open()
      await released.opened
      return {}
    })
  })
  const watching = await openHttp(t, app)
  watching.send('GET', '/pool/events')
  const holding = app.inject('/hold/1?token=topsecret')
  await held.opened
  await watching.receives('"route":"GET /hold/:id"')
  await watching.receives('"state":"idle"')
  await watching.receives('select $1::text as held')
  released.open()
  t.equal((await holding).statusCode, 200)
  await watching.receives('"holdP95":')
  const { password } = new URL(database.connectionString)
  for (const secret of ['a secret', 'topsecret', 'postgres://', password || '\0']) {
    t.notOk(watching.received.includes(secret), secret)
  }
  watching.destroy()
})

test('the latest reports are kept, without evidence and places, and like ones count as one', async (t) => {
  const app = await withPage(t, { intervalMillis: 100 })
  const verdict = {
    cause: 'leak',
    sentence: 'GET /a leaks',
    routes: ['GET /a'],
    evidence: { query: 'hidden' },
  } as const
  const holder = { method: 'GET', route: '/a', count: 1, oldestMillis: 9, busyMillis: 1, idleMillis: 8, busy: 0 }
  const holders = [{ ...holder, lastStatement: 'select 1', callSite: 'at /srv/app.js' }]
  const publish = (report: Report) => channels.report.publish({ pool: app.db.pool, log: app.log, report })
  for (let count = 0; count < 15; count++) publish(report({ code: `CODE_${count}` }))
  for (let count = 0; count < 3; count++) publish(report({ verdict, holders }))
  const client = await openHttp(t, app)
  client.send('GET', '/pool/events')
  await client.receives('event: reports')
  await client.receives('"pool":')
  const [, data = ''] = /event: reports\ndata: (.*)\n/.exec(client.received) ?? []
  const reports = JSON.parse(data) as { times: number; sentence?: string; holders: unknown[] }[]
  t.equal(reports.length, 10)
  t.match(reports[0], { times: 3, cause: 'leak', sentence: 'GET /a leaks', holders: [{ name: 'GET /a', count: 1 }] })
  t.notMatch(data, /hidden|srv\/app/)
  publish(report({ code: 'LATER' }))
  await client.receives('LATER')
  client.destroy()
})

test('at most twenty pages are open, the next one is told to come again', async (t) => {
  const app = await withPage(t)
  const clients: HttpClient[] = []
  while (clients.length < 20) {
    const client = await openHttp(t, app)
    clients.push(client)
    client.send('GET', '/pool/events')
    await client.receives('retry: 2000')
  }
  const { statusCode, headers } = await app.inject('/pool/events')
  t.equal(statusCode, 503)
  t.equal(headers['retry-after'], '10')
  for (const client of clients) client.destroy()
  await eventually(() => !isListenedTo())
  const again = await openHttp(t, app)
  again.send('GET', '/pool/events')
  await again.receives('retry: 2000')
  again.destroy()
})

test('open pages, one of which does not read, do not hold up close()', async (t) => {
  const app = await withPage(t, { intervalMillis: 100 })
  const [reading, deaf] = [await openHttp(t, app), await openHttp(t, app)]
  for (const client of [reading, deaf]) {
    client.send('GET', '/pool/events')
    await client.receives('"pool":')
  }
  deaf.pause()
  const since = performance.now()
  await app.close()
  t.ok(performance.now() - since < 1000, `closed after ${performance.now() - since} ms`)
  await eventually(() => reading.closed)
  t.equal(isListenedTo(), false)
})

test('a HEAD of the stream is no stream', async (t) => {
  const app = await withPage(t)
  t.equal((await app.inject({ method: 'HEAD', url: '/pool/events' })).statusCode, 404)
})

test('two pools have a page each, and each sees its own', async (t) => {
  const app = await buildApp(t, database, { decorator: 'orders' }, async (app) => {
    await app.register(requestDbDashboard, { path: '/orders', decorator: 'orders', intervalMillis: 100 })
  })
  const other = await withPage(t, { intervalMillis: 100 })
  const client = await openHttp(t, app)
  client.send('GET', '/orders/events')
  await client.receives('"name":"orders"')
  channel('fastify-request-db:report').publish({
    pool: other.db.pool,
    log: other.log,
    report: report({ code: 'FOREIGN' }),
  })
  await other.db.session((db) => sql`select 1`.execute(db))
  const soFar = client.received.length
  await eventually(() => client.received.length > soFar + 1000)
  t.match(client.received.slice(soFar), '"checkouts":0')
  t.notMatch(client.received, 'FOREIGN')
  client.destroy()
})
