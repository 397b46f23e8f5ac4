import type { AddressInfo } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyInstance } from 'fastify'
import { argumentOfParent, serveParent } from './child.ts'
import type { Contender, ContenderArgument, Work } from './contender.ts'
import { type Entry, fiveFrom, itemOf, LARGE_BYTES } from './items.ts'

/*
 * A contender's own process: the same routes and schemas for everyone, and what the contender does behind them.
 */

export interface ServerArgument extends ContenderArgument {
  /** A file in contenders/, without its ending. */
  readonly contender: string
}

const HELD_MILLIS = 100
const large = Buffer.alloc(LARGE_BYTES, 'x')

const params = { type: 'object', properties: { id: { type: 'integer' } }, required: ['id'] }
const item = {
  type: 'object',
  properties: { id: { type: 'integer' }, name: { type: 'string' }, price: { type: 'integer' } },
  required: ['id', 'name', 'price'],
}
const count = {
  type: 'object',
  properties: { id: { type: 'integer' }, before: { type: 'integer' }, after: { type: 'integer' } },
  required: ['id', 'before', 'after'],
}
const entry = {
  type: 'object',
  properties: { item: { type: 'integer' }, note: { type: 'string' } },
  required: ['item', 'note'],
}
const answers = (response: object) => ({ schema: { params, response: { 200: response } } })

type OfItem = { Params: { id: number } }
let held = 0

function databaseRoutes(app: FastifyInstance, work: Work): void {
  app.get<OfItem>('/items/:id', answers(item), (request) => work.read(request.params.id, request))
  app.put<OfItem>('/counts/:id', answers(count), (request) => work.update(request.params.id, request))
  app.get<OfItem>('/items/:id/five', answers({ type: 'array', items: item }), (request) =>
    work.readAll(fiveFrom(request.params.id), request),
  )
  app.post<{ Body: Entry }>(
    '/entries',
    { schema: { body: entry, response: { 201: entry } } },
    async (request, reply) => {
      await work.insert(request.body, request)
      reply.code(201)
      return request.body
    },
  )
  app.get<OfItem>('/items/:id/large', { schema: { params } }, async (request) => {
    await work.read(request.params.id, request)
    return large
  })
  app.get<OfItem>('/items/:id/held', answers(item), async (request) => {
    held++
    try {
      return await work.hold(request.params.id, () => sleep(HELD_MILLIS), request)
    } finally {
      held--
    }
  })
}

/** CPU time in microseconds since the start, and held requests that have not ended. */
function usage(): { cpuMicros: number; held: number } {
  const { user, system } = process.cpuUsage()
  return { cpuMicros: user + system, held }
}

const { contender, ...argument } = argumentOfParent<ServerArgument>()
const { default: connect } = (await import(`./contenders/${contender}.ts`)) as { default: Contender }
const app = Fastify()
const work = await connect(app, argument)
app.get<OfItem>('/untouched/:id', answers(item), async (request) => itemOf(request.params.id))
if (work) databaseRoutes(app, work)
await app.listen({ port: 0, host: '127.0.0.1' })

const calls = { usage }
export type ServerCalls = typeof calls
serveParent(calls, (app.server.address() as AddressInfo).port)
