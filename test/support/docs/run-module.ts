/**
 * Runs the modules of a page as a program: node --import=tsx run-module.ts file…
 *
 * Every page's app listens on port 3000, and goes on with routes in later blocks. Here it listens when all of them have
 * run, on a port that is free, says which to the parent, and is closed when the parent lets go of the channel. A page
 * that leaves anything else open does not end, and is a failure.
 */
import { subscribe } from 'node:diagnostics_channel'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
import type { FastifyInstance, FastifyListenOptions } from 'fastify'

const PORT = 3000
const apps: FastifyInstance[] = []
const listeners: (() => Promise<string>)[] = []

subscribe('fastify.initialization', (message) => {
  const { fastify } = message as { fastify: FastifyInstance }
  const listen = fastify.listen.bind(fastify) as (options: FastifyListenOptions) => Promise<string>
  apps.push(fastify)
  const later = async (options: FastifyListenOptions) => {
    if (options.port !== PORT) return listen(options)
    listeners.push(() => listen({ ...options, port: 0, host: '127.0.0.1' }))
    return `http://127.0.0.1:${PORT}`
  }
  fastify.listen = later as FastifyInstance['listen']
})

for (const file of process.argv.slice(2)) await import(pathToFileURL(file).href)

const urls: string[] = []
for (const listen of listeners) urls.push(await listen())
process.send?.(urls)
if (process.connected) await once(process, 'disconnect')
// A page of tests closes its app itself, when they have run.
if (!process.argv.slice(2).some((file) => readFileSync(file, 'utf8').includes("'node:test'"))) {
  for (const app of apps) await app.close()
}
