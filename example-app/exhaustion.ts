import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Report, RequestDbError } from 'fastify-request-db'
import { buildApp } from './app.ts'
import { searchAirports } from './repositories/airports.ts'
import { onPostgres } from './temporary.ts'

// `npm run demo:exhaustion`: why a pool runs out under a load that the database hardly notices, and what to change.

const POOL = { size: 8, maxOverflow: 4, timeoutMillis: 10_000 }
const REQUESTS = 200
const SLOW_SERVICE_MILLIS = 2000
const WIDTH = 100

const say = (text = '') => console.log(text)

/** A service that takes its time: a payment, a mail server, a language model. */
const askSlowService = (signal: AbortSignal) => pause(SLOW_SERVICE_MILLIS, { price: 99 }, { signal })

function quoteRoutes(app: FastifyInstance, signal: AbortSignal): void {
  app.get('/quotes', async ({ db }) => {
    const [airport] = await searchAirports(db, 'LHR', 1)
    // The transaction is open, and the connection held, while this is awaited.
    const { price } = await askSlowService(signal)
    return { to: airport?.city, price }
  })

  app.get('/repaired/quotes', async ({ db }) => {
    const [airport] = await searchAirports(db, 'LHR', 1)
    await db.commit()
    const { price } = await askSlowService(signal)
    return { to: airport?.city, price }
  })
}

await onPostgres(async (connectionString, signal) => {
  const app = buildApp({ connectionString, mailer: { send: async () => {} }, pool: POOL })
  const reports: Report[] = []
  app.addHook('onError', async (_request, _reply, error) => {
    const { report } = error as RequestDbError
    if (report) reports.push(report)
  })
  quoteRoutes(app, signal)
  try {
    const url = await app.listen({ port: 0, host: '127.0.0.1' })
    await demonstrate(url, reports, signal)
  } finally {
    app.server.closeAllConnections()
    await app.close()
  }
})

async function demonstrate(url: string, reports: Report[], signal: AbortSignal): Promise<void> {
  say(`\nThe pool: size ${POOL.size}, overflow ${POOL.maxOverflow}, timeout ${POOL.timeoutMillis / 1000} s.`)
  say(`The route: one query of a millisecond, then a service that takes ${SLOW_SERVICE_MILLIS / 1000} s.`)
  headline(`1. ${REQUESTS} requests at once, the service is called inside of the transaction`)
  const faulty = await load(`${url}/quotes`, signal)
  showLoad(faulty)
  say('\nWhat a client sees:\n')
  say(indent(JSON.stringify(JSON.parse(faulty.refusal ?? '{}'), null, 2)))
  say('\nWhat the log and error.report say:\n')
  if (reports[0]) showReport(reports[0])
  headline('2. The same load, with one line more: await request.db.commit() before the service is called')
  showLoad(await load(`${url}/repaired/quotes`, signal))
  headline('What happened')
  say(
    wrap(
      `Each request held its connection for ${SLOW_SERVICE_MILLIS / 1000} s and used it for a few milliseconds. ` +
        `${POOL.size + POOL.maxOverflow} connections held for ${SLOW_SERVICE_MILLIS / 1000} s serve ` +
        `${(POOL.size + POOL.maxOverflow) / (SLOW_SERVICE_MILLIS / 1000)} requests a second, so in ` +
        `${POOL.timeoutMillis / 1000} s about ${((POOL.size + POOL.maxOverflow) * POOL.timeoutMillis) / SLOW_SERVICE_MILLIS} ` +
        `of ${REQUESTS} got one, and the rest gave up. More connections would only have moved the limit: give them back ` +
        'before you wait for something else.',
    ),
  )
}

interface Load {
  readonly byStatus: Map<number, number>
  readonly slowestMillis: number
  readonly refusal: string | undefined
}

async function load(url: string, signal: AbortSignal): Promise<Load> {
  const since = performance.now()
  const byStatus = new Map<number, number>()
  let refusal: string | undefined
  const ask = async () => {
    const response = await fetch(url, { signal })
    const body = await response.text()
    byStatus.set(response.status, (byStatus.get(response.status) ?? 0) + 1)
    if (response.status === 503) refusal ??= body
  }
  await Promise.all(Array.from({ length: REQUESTS }, ask))
  return { byStatus, refusal, slowestMillis: performance.now() - since }
}

function showLoad({ byStatus, slowestMillis }: Load): void {
  const answers = Array.from(byStatus, ([status, count]) => `${count} x ${status}`).sort()
  say(`  ${answers.join(', ')}; the last answer after ${(slowestMillis / 1000).toFixed(1)} s`)
}

function showReport({ size, maxOverflow, waiting, holders, verdict }: Report): void {
  say(`  pool      size ${size} overflow ${maxOverflow}, ${waiting} waiting`)
  for (const { method, route, count, oldestMillis, idleMillis, lastStatement = '' } of holders) {
    const times = `oldest ${(oldestMillis / 1000).toFixed(1)} s, of which idle ${(idleMillis / 1000).toFixed(1)} s`
    say(`  held by   ${method} ${route} x${count} (${times})`)
    say(`            last: ${lastStatement.replace(/\s+/g, ' ').slice(0, WIDTH - 20)} …`)
  }
  say(`  verdict   ${verdict?.cause}`)
  say(indent(wrap(verdict?.sentence ?? '', WIDTH - 12), 12))
}

function headline(text: string): void {
  say(`\n${'─'.repeat(WIDTH)}\n${text}\n`)
}

function indent(text: string, by = 2): string {
  return text.replaceAll(/^/gm, ' '.repeat(by))
}

function wrap(text: string, width = WIDTH): string {
  return text.replaceAll(new RegExp(`(.{1,${width}})(?: |$)`, 'g'), '$1\n').trimEnd()
}
