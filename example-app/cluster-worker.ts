import cluster from 'node:cluster'
import { readEnvironment } from './environment.ts'
import type { WorkerReport } from './fleet.ts'
import { serve } from './serve.ts'

// One of the workers that cluster.ts starts.

const report = (what: WorkerReport) => process.send?.(what)

const stopping = new AbortController()
const { signal } = stopping
// Ctrl-C reaches everybody in the terminal: the first process says when its workers are to stop.
for (const name of ['SIGINT', 'SIGHUP'] as const) process.on(name, () => {})
process.on('SIGTERM', () => stopping.abort())
process.on('message', (order) => {
  if (order === 'stop') stopping.abort()
})
process.stdout.on('error', () => {})

try {
  const { port, databaseUrl: connectionString = '' } = readEnvironment(process.env)
  await serve({
    port,
    connectionString,
    signal,
    prepare: (app) => app.addHook('onRequest', async (_request, reply) => void reply.header('x-worker', process.pid)),
    listening: (url, lines) => report({ listening: { url, lines } }),
  })
} catch (error) {
  if (error !== signal.reason) {
    report({ failed: error instanceof Error ? error.message : String(error) })
    process.exitCode = 1
  }
}
// From here on nothing keeps this process alive.
cluster.worker?.disconnect()
