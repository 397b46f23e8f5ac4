import { type ChildProcess, spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'
import { eventually } from './eventually.ts'
import { isAlive } from './is-alive.ts'
import type { Original } from './standby-cluster.ts'

/** What a keeper process is started for. */
export interface KeeperTask {
  readonly flags: readonly string[]
  readonly owner?: { readonly pid: number; readonly file: string }
  /** For a standby: whose. */
  readonly copyOf?: Original
}
export type KeeperOrder = { readonly id: number; readonly call: 'start' | 'stop' | 'kill' }
export type KeeperAnswer = {
  readonly connectionString?: string
  readonly done?: number
  readonly failed?: string
}

/** A PostgreSQL of a test's own, for what would disturb others. */
export interface OwnServer {
  /** The superuser's, for the database `postgres`. The port stays the same over restarts. */
  readonly connectionString: string
  start(): Promise<void>
  /** As `pg_ctl stop -m fast`. */
  stop(): Promise<void>
  /** As a crash: every backend is gone without a word of its own. */
  kill(): Promise<void>
  /** As `pg_ctl restart -m fast`. */
  restart(): Promise<void>
}

interface Note {
  readonly connectionString: string
  readonly keeper: number
}

// Test files are children of the run: its pid names the note that says where the server is.
const noteOf = (runPid: number) => join(tmpdir(), `fastify-request-db-tests-${runPid}.json`)

let shared: Promise<string> | undefined

/** The server all tests of this run share: DATABASE_URL, or the run's embedded one, or else one for this process. */
export function sharedServer(): Promise<string> {
  shared ??= Promise.resolve(
    process.env.DATABASE_URL || readNote(process.ppid)?.connectionString || startForThisProcess(),
  )
  return shared
}

async function startForThisProcess(): Promise<string> {
  const keeper = await startKeeper({ flags: [] })
  // It stops when the channel to this process closes, so it need not, and must not, keep the process alive.
  keeper.child.unref()
  keeper.child.channel?.unref()
  return keeper.connectionString
}

function readNote(runPid: number): Note | undefined {
  try {
    const note = JSON.parse(readFileSync(noteOf(runPid), 'utf8')) as Note
    return isAlive(note.keeper) ? note : undefined
  } catch {
    return undefined // No note: this file runs alone.
  }
}

/** Before a run: starts the shared server and leaves the note. */
export async function startForRun(runPid: number): Promise<void> {
  const file = noteOf(runPid)
  await rm(file, { force: true })
  const { child, connectionString } = await startKeeper({ flags: [], owner: { pid: runPid, file } })
  await writeFile(file, JSON.stringify({ connectionString, keeper: child.pid ?? 0 } satisfies Note))
  child.disconnect()
  child.unref()
}

/** After a run: takes the note away and waits until the server is gone. */
export async function stopForRun(runPid: number): Promise<void> {
  const note = readNote(runPid)
  await rm(noteOf(runPid), { force: true })
  if (note) await eventually(() => !isAlive(note.keeper), { withinMillis: 20_000 })
}

/** A server for this test alone, on an unused port; `flags` such as `max_connections=20`. Gone at the test's end. */
export function ownServer(t: Test, options: { flags?: readonly string[] } = {}): Promise<OwnServer> {
  return serverFor(t, { flags: options.flags ?? [] })
}

/** A server of whatever kind, at the end of `t` gone. */
export async function serverFor(t: Test, task: KeeperTask): Promise<OwnServer> {
  const { child, connectionString } = await startKeeper(task)
  t.teardown(async () => {
    child.disconnect()
    await eventually(() => child.exitCode !== null || child.signalCode !== null, { withinMillis: 20_000 })
  })
  let orders = 0
  const call = (name: KeeperOrder['call']) =>
    new Promise<void>((resolve, reject) => {
      const id = ++orders
      child.on('message', function answered(answer: KeeperAnswer) {
        if (answer.done !== id) return
        child.off('message', answered)
        answer.failed ? reject(new Error(answer.failed)) : resolve()
      })
      child.send({ id, call: name } satisfies KeeperOrder)
    })
  return {
    connectionString,
    start: () => call('start'),
    stop: () => call('stop'),
    kill: () => call('kill'),
    restart: async () => {
      await call('stop')
      await call('start')
    },
  }
}

function startKeeper(task: KeeperTask): Promise<{ child: ChildProcess; connectionString: string }> {
  const script = fileURLToPath(new URL('postgres-keeper.ts', import.meta.url))
  const child = spawn(process.execPath, ['--import=tsx', script, JSON.stringify(task)], {
    cwd: fileURLToPath(new URL('../..', import.meta.url)),
    // A process group of its own: Ctrl-C in the terminal reaches the run, and the keeper cleans up after it.
    detached: true,
    stdio: ['ignore', 'ignore', 'ignore', 'ipc'],
  })
  return new Promise((resolve, reject) => {
    child.once('error', reject)
    child.once('exit', (code) => reject(new Error(`The keeper of PostgreSQL ended with ${code}`)))
    child.once('message', ({ connectionString, failed }: KeeperAnswer) =>
      connectionString ? resolve({ child, connectionString }) : reject(new Error(failed)),
    )
  })
}
