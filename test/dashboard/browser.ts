import Fastify, { type FastifyInstance } from 'fastify'
import { sql } from 'kysely'
import type { Browser, Page } from 'playwright-core'
import requestDbDashboard from '../../lib/dashboard.ts'
import requestDb from '../../lib/index.ts'
import { buildApp } from '../support/app.ts'
import { findChromium, openBrowser, openPage } from '../support/browser.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { type Gate, gate } from '../support/gate.ts'
import { listen } from '../support/http-client.ts'
import { type Test, t, test } from '../support/test.ts'

const executablePath = findChromium()
const database = await createDatabase(t, {})
const browser = executablePath && (await openBrowser(t, executablePath))

/** A test that is skipped where there is no browser. */
function inBrowser(name: string, body: (t: Test, browser: Browser) => Promise<void>): void {
  if (browser) test(name, (t) => body(t, browser))
  else t.skip(`${name} (no Chromium: install it, or say where it is in CHROMIUM_PATH)`, () => {})
}

interface Load {
  readonly app: FastifyInstance
  readonly url: string
  /** Lets go the handlers that do something else than SQL. */
  readonly released: Gate
}

/** Three connections: two for handlers that hold theirs idle, one for a slow statement, and others must wait. */
async function loaded(t: Test): Promise<Load> {
  const released = gate()
  const options = { pool: { size: 2, maxOverflow: 1, timeoutMillis: 600 } }
  const app = await buildApp(t, database, options, async (app) => {
    await app.register(requestDbDashboard, { path: '/pool', intervalMillis: 200 })
    app.get('/calls-a-slow-service-inside-its-transaction/:id', async (request) => {
      await sql`select ${'secret'}::text`.execute(request.db)
      await released.opened
      return {}
    })
    app.get('/slow', async (request) => {
      await sql`select pg_sleep(2.5)`.execute(request.db)
      return {}
    })
    app.get('/quick', async (request) => {
      await sql`select 1`.execute(request.db)
      return {}
    })
  })
  t.teardown(() => released.open())
  return { app, url: `http://127.0.0.1:${await listen(app)}`, released }
}

const exhaust = ({ app }: Load) => {
  const paths = ['/calls-a-slow-service-inside-its-transaction/1', '/calls-a-slow-service-inside-its-transaction/2']
  const held = [...paths, '/slow'].map((path) => app.inject(path))
  const waiting = Array.from({ length: 5 }, () => app.inject('/quick'))
  return Promise.all([...held, ...waiting])
}

/** How many pixels of a lane's canvas have the colour that the style sheet calls so. */
const pixels = (page: Page, colour: string, lane: string): Promise<number> =>
  page.evaluate(`(() => {
    const canvas = document.querySelector('${lane} canvas')
    const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
    probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--${colour}').trim()
    probe.fillRect(0, 0, 1, 1)
    const [red, green, blue] = probe.getImageData(0, 0, 1, 1).data
    probe.canvas.width = canvas.width
    probe.canvas.height = canvas.height
    probe.drawImage(canvas, 0, 0)
    const { data } = probe.getImageData(0, 0, canvas.width, canvas.height)
    let count = 0
    for (let at = 0; at < data.length; at += 4) {
      if (data[at] === red && data[at + 1] === green && data[at + 2] === blue) count++
    }
    return count
  })()`)

inBrowser(
  'under load the page says who is to blame, without a word on the console or to elsewhere',
  async (t, browser) => {
    const load = await loaded(t)
    const { page, complaints, origins } = await openPage(t, browser)
    await page.goto(`${load.url}/pool`)
    await page.locator('#word', { hasText: 'Room to spare' }).waitFor()
    const answers = exhaust(load)

    await page.locator('#waiters tbody tr', { hasText: 'GET /quick5' }).waitFor()
    await page.locator('#lanes [data-state=busy] .text', { hasText: 'GET /slow' }).waitFor()
    const idle = page.locator('#lanes [data-state=idle]', { hasText: 'calls-a-slow-service' })
    await idle.nth(1).waitFor()
    await page.locator('#word', { hasText: 'Exhausted' }).waitFor()
    await page.locator('#sentence', { hasText: 'All 3 connections are in use' }).waitFor()
    await page.locator('#sentence', { hasText: '2 are held by GET /calls-a-slow-service' }).waitFor()
    await eventually(async () => (await pixels(page, 'busy', '#lanes [data-state=busy]')) > 50, { withinMillis: 4000 })
    await eventually(async () => (await pixels(page, 'idle', '#lanes [data-state=idle]')) > 50, { withinMillis: 4000 })
    await page.locator('#report-list .cause').first().waitFor()
    t.equal(await page.locator('#refused').textContent(), '5')
    t.match(await page.title(), /^Exhausted: pool db$/)

    load.released.open()
    await answers
    await page.locator('#routes tbody tr', { hasText: 'GET /slow' }).waitFor()
    t.notMatch(await page.content(), 'secret')
    t.strictSame(complaints, [])
    t.strictSame([...origins], [load.url])
  },
)

inBrowser('it can be used with the keyboard alone', async (t, browser) => {
  const load = await loaded(t)
  const { page } = await openPage(t, browser, { reducedMotion: 'reduce' })
  await page.goto(`${load.url}/pool/`)
  const answers = exhaust(load)
  await page.locator('#report-list summary').waitFor()
  load.released.open()
  await answers
  await page.keyboard.press('Tab')
  t.equal(await page.evaluate('document.activeElement.id'), 'pause')
  t.not(await page.evaluate('getComputedStyle(document.activeElement).outlineStyle'), 'none')
  await page.keyboard.press('Enter')
  t.equal(await page.locator('#pause').getAttribute('aria-pressed'), 'true')
  t.equal(await page.locator('#announcer').textContent(), 'Paused')
  const figures = await page.locator('#figures').textContent()
  await load.app.inject('/quick')
  await page.keyboard.press('Enter')
  t.equal(await page.locator('#pause').textContent(), 'Pause')
  await eventually(async () => (await page.locator('#figures').textContent()) !== figures)
  await page.locator('#lanes').focus()
  const readout = page.locator('#readout')
  await eventually(async () => {
    for (const key of ['ArrowDown', 'ArrowDown', 'End', 'ArrowUp', 'ArrowUp']) {
      await page.keyboard.press(key)
      if (/^(500 ms|1(\.0)? s) ago, \d+: /.test((await readout.textContent()) ?? '')) return true
    }
    return false
  })
  for (const key of ['Home', 'ArrowUp', 'ArrowUp']) await page.keyboard.press(key)
  t.match(await readout.textContent(), /^60 s ago, .+: nothing known$/, 'before the page was opened')
  t.ok((await pixels(page, 'cursor', '#lanes li:nth-child(2)')) > 5, 'the place is marked')
  await page.locator('#report-list summary').first().focus()
  t.match(await readout.textContent(), /^Point at a lane/)
  await page.keyboard.press('Enter')
  await page.locator('#report-list details[open] .inside', { hasText: 'Held by' }).waitFor()
})

inBrowser('on a phone nothing is cut off or scrolls sideways, and the dark has its own colours', async (t, browser) => {
  const load = await loaded(t)
  const viewport = { width: 375, height: 740 }
  const light = await openPage(t, browser, { viewport, deviceScaleFactor: 2 })
  const dark = await openPage(t, browser, { viewport, deviceScaleFactor: 2, colorScheme: 'dark' })
  const backgrounds: unknown[] = []
  for (const { page } of [light, dark]) await page.goto(`${load.url}/pool`)
  const answers = exhaust(load)
  for (const { page } of [light, dark]) {
    await page.locator('#report-list summary').waitFor()
    t.equal(await page.evaluate('document.documentElement.scrollWidth'), 375)
    backgrounds.push(await page.evaluate('getComputedStyle(document.body).backgroundColor'))
  }
  t.strictSame(backgrounds, ['rgb(245, 246, 248)', 'rgb(16, 21, 27)'])
  load.released.open()
  await answers
})

inBrowser('the page does not grow while it is open', async (t, browser) => {
  const load = await loaded(t)
  const { page } = await openPage(t, browser)
  await page.goto(`${load.url}/pool`)
  load.released.open()
  const elements = () => page.evaluate('document.querySelectorAll("*").length') as Promise<number>
  const shown = async (checkouts: number) => {
    while (load.app.db.snapshot().totals.checkouts < checkouts) {
      await Promise.all(
        ['/quick', '/quick', '/calls-a-slow-service-inside-its-transaction/1'].map((u) => load.app.inject(u)),
      )
    }
    await page.locator('#routes tbody tr', { hasText: 'calls-a-slow-service' }).waitFor()
  }
  await shown(30)
  await eventually(() => load.app.db.snapshot().checkedOut === 0)
  const before = await elements()
  await shown(900)
  t.ok((await elements()) <= before + 15, `from ${before} to ${await elements()} elements`)
})

inBrowser('it says that it is disconnected, and comes back by itself', async (t, browser) => {
  const load = await loaded(t)
  const { page } = await openPage(t, browser)
  await page.goto(`${load.url}/pool`)
  await page.locator('#word', { hasText: 'Room to spare' }).waitFor()
  await load.app.close()
  await page.locator('#link', { hasText: 'disconnected, retrying' }).waitFor()
  await page.locator('#word', { hasText: 'Disconnected' }).waitFor()
  const again = Fastify()
  t.teardown(() => again.close())
  await again.register(requestDb, { connectionString: database.connectionString })
  await again.register(requestDbDashboard, { path: '/pool' })
  await again.listen({ host: '127.0.0.1', port: Number(new URL(load.url).port) })
  await page.locator('#word', { hasText: 'Room to spare' }).waitFor({ timeout: 10_000 })
  t.equal(await page.locator('#link-text').textContent(), 'live')
})
