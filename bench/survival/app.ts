import type { AddressInfo } from 'node:net'
import Fastify from 'fastify'
import { argumentOfParent, serveParent } from '../child.ts'
import type { Connect, ContenderArgument, Handler } from './contender.ts'
import { INSERT } from './contender.ts'
import { Moments } from './moments.ts'
import { SCENARIOS } from './scenarios.ts'

/*
 * One contender in one scenario: a process of its own, since that it dies is among the things that can happen.
 */

export interface AppArgument extends ContenderArgument {
  /** A file in contenders/, without its ending. */
  readonly contender: string
  readonly scenario: string
}

const { contender: file, scenario, ...argument } = argumentOfParent<AppArgument>()
const { default: connect } = (await import(`./contenders/${file}.ts`)) as { default: Connect }
const log: string[] = []
const app = Fastify({ logger: { level: 'warn', stream: { write: (line) => void log.push(line) } } })
const contender = await connect(app, argument)
const moments = new Moments()
let later: (() => Promise<unknown>) | undefined

app.addHook('onRequest', async ({ url }, { raw }) => {
  raw.once('close', () => raw.writableEnded || moments.come(`${url} is left`))
})

const post = (url: string, handler: Handler) => contender.route({ method: 'POST', url }, handler)
post('/ordinary', async ({ query }) => {
  await query(INSERT, ['ordinary'])
  return 'done'
})
SCENARIOS.find(({ name }) => name === scenario)?.serve({
  app,
  contender,
  post,
  come: (name) => moments.come(name),
  when: (name) => moments.when(name),
  keep: (use) => {
    later = use
  },
})

process.once('SIGTERM', async () => {
  await app.close()
  process.exit(0)
})
await app.listen({ port: 0, host: '127.0.0.1' })

const calls = {
  come: (name: string) => moments.come(name),
  when: (name: string) => moments.when(name),
  /** What the log says at the level of warnings and above. */
  log: () => log,
  /** Uses what a handler has kept: whether that was possible. */
  later: () =>
    later?.().then(
      () => true,
      () => false,
    ),
}
export type AppCalls = typeof calls
serveParent(calls, (app.server.address() as AddressInfo).port)
