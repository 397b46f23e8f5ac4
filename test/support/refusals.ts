import type { FastifyInstance } from 'fastify'
import type { Cause, Report, RequestDbError, RequestDbOptions } from '../../lib/index.ts'
import { buildApp } from './app.ts'
import { captureLog } from './captured-log.ts'
import type { Database } from './database.ts'
import type { Test } from './test.ts'

/** An app whose refusals are kept. */
export async function watchRefusals(
  t: Test,
  database: Database,
  options: RequestDbOptions,
  routes: (app: FastifyInstance) => unknown,
) {
  const log = captureLog()
  const refusals: RequestDbError[] = []
  const app = await buildApp(
    t,
    database,
    options,
    (app) => {
      app.addHook('onError', async (_request, _reply, error) => {
        refusals.push(error as RequestDbError)
      })
      return routes(app)
    },
    { logger: log.options },
  )
  const reports = () => log.lines.filter(({ requestDb }) => (requestDb as { event?: string })?.event === 'report')
  return { app, log, refusals, reports }
}

export type Watched = Awaited<ReturnType<typeof watchRefusals>>

/** Every refusal and the log say the same, and it is that. */
export function says(t: Test, { refusals, reports }: Watched, cause: Cause, route?: string): Report {
  const refused = refusals.filter(({ statusCode }) => statusCode === 503)
  t.ok(refused.length > 0, 'somebody was refused')
  for (const { report } of refused) {
    t.equal(report?.verdict?.cause, cause, `${report?.verdict?.sentence}`)
    if (route !== undefined) t.equal(report?.verdict?.routes[0], route)
  }
  const [line] = reports()
  t.match(line?.msg, new RegExp(`verdict ${cause}: `))
  t.match(line, { requestDb: { verdict: { cause } } })
  t.comment(line?.msg ?? '')
  return refused[0]?.report as Report
}

/** So many requests at once. */
export const get = (app: FastifyInstance, url: string, times: number) =>
  Promise.all(Array.from({ length: times }, () => app.inject(url)))
