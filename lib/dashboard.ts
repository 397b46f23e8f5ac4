import type { FastifyInstance, FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify'
import { isLocal } from './dashboard/access.ts'
import { Audience } from './dashboard/audience.ts'
import { Board } from './dashboard/board.ts'
import { files, html, htmlAt } from './dashboard/files.ts'
import { checkDashboardOptions, type DashboardOptions } from './dashboard/options.ts'
import { Reports } from './dashboard/reports.ts'
import { listen } from './observe/channels.ts'
import { poolOf } from './observe/registration.ts'

/** A live page of what the pool is doing. While no page is open, only reports are listened to. */
const requestDbDashboard: FastifyPluginAsync<DashboardOptions> = async (fastify, input) => {
  const { path, decorator, allow, intervalMillis } = checkDashboardOptions(input)
  const pool = poolOf(fastify, decorator)
  const reports = new Reports()
  const unlisten = listen(pool, { report: ({ report }) => reports.add(report) })

  let board: Board | undefined
  const audience = new Audience((isWatched) => {
    board?.stop()
    board = isWatched ? new Board(pool, intervalMillis, (update) => audience.send(update, reports)) : undefined
  })

  fastify.addHook('preHandler', async (request, reply) => {
    if (allow === undefined ? isLocal(request) : (await allow(request)) === true) return
    return refuse(reply, 403, 'Not for you. Without the option `allow` this page is only for the machine it runs on.\n')
  })

  const page = (request: FastifyRequest, reply: FastifyReply) =>
    reply.headers(html.headers).send(htmlAt(request.originalUrl))
  fastify.get(path || '/', page)
  // Where Fastify ignores slashes at the end, the route is there already.
  if (path !== '' && !ignoresTrailingSlash(fastify)) fastify.get(`${path}/`, page)
  for (const { name, text, headers } of files) {
    fastify.get(`${path}/${name}`, (_request, reply) => reply.headers(headers).send(text))
  }
  // A HEAD would never be answered.
  fastify.get(`${path}/events`, { exposeHeadRoute: false, logLevel: 'silent' }, (request, reply) => {
    if (audience.isFull) return refuse(reply.header('retry-after', '10'), 503, 'Too many pages are open.\n')
    audience.add(request, reply)
  })

  fastify.addHook('preClose', async () => audience.close())
  fastify.addHook('onClose', async () => unlisten())
}

function ignoresTrailingSlash({ initialConfig }: FastifyInstance): boolean {
  const { ignoreTrailingSlash, routerOptions } = initialConfig as {
    ignoreTrailingSlash?: boolean
    routerOptions?: { ignoreTrailingSlash?: boolean }
  }
  return ignoreTrailingSlash === true || routerOptions?.ignoreTrailingSlash === true
}

const refuse = (reply: FastifyReply, status: number, text: string): FastifyReply =>
  reply.code(status).headers({ 'content-type': 'text/plain; charset=utf-8', 'cache-control': 'no-store' }).send(text)

export type { DashboardOptions }
export { requestDbDashboard as default, requestDbDashboard, requestDbDashboard as 'module.exports' }
