import { once } from 'node:events'
import { createServer } from 'node:net'
import type { Environment } from './environment.ts'
import { stopWithNpm } from './npm.ts'
import { startPostgres } from './postgres.ts'
import { reasonOf } from './reason.ts'

export const HOST = '127.0.0.1'

export const say = (line: string) => console.log(line)

/** Runs `main` until somebody wants it to stop: `signal` aborts. What it cannot go on with is said in one line. */
export async function run(main: (signal: AbortSignal) => Promise<void>): Promise<void> {
  // A terminal that is closed takes nothing more, which must not keep PostgreSQL from being stopped.
  process.stdout.on('error', () => {})
  // The handlers stay, so that a second Ctrl-C does not cut the first one short.
  const stopping = new AbortController()
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => stopping.abort())
  stopWithNpm(() => stopping.abort())
  stopping.signal.addEventListener('abort', () => say('\nStopping'))
  try {
    await main(stopping.signal)
  } catch (error) {
    if (error === stopping.signal.reason) return
    console.error(error instanceof Error ? error.message : error)
    process.exitCode = 1
  }
}

/** Does `work` on DATABASE_URL, or on the embedded PostgreSQL, which is stopped when everything else is. */
export async function withPostgres(
  { dataFolder, databaseUrl }: Environment,
  signal: AbortSignal,
  work: (connectionString: string) => Promise<void>,
): Promise<void> {
  if (databaseUrl) return work(databaseUrl)
  const postgres = await startPostgres({ folder: dataFolder, say }).catch((error: unknown) => {
    // Ctrl-C ends initdb too. That is no failure.
    signal.throwIfAborted()
    throw error
  })
  try {
    say(`PostgreSQL listens on ${HOST}:${postgres.port}`)
    await work(postgres.connectionString)
  } finally {
    await postgres.stop()
    if (signal.aborted) say('PostgreSQL is stopped')
  }
}

/** The port, or for 0 one that is free. To be asked before PostgreSQL is started for nothing. @throws when it is in use. */
export async function freePort(port: number): Promise<number> {
  const probe = createServer().listen(port, HOST)
  try {
    await once(probe, 'listening')
  } catch (error) {
    const inUse = error instanceof Error && 'code' in error && error.code === 'EADDRINUSE'
    throw new Error(inUse ? `Port ${port} is in use: free it, or set PORT to another` : reasonOf(error))
  }
  const address = probe.address()
  probe.close()
  await once(probe, 'close')
  return address && typeof address === 'object' ? address.port : port
}
