import cluster, { type Worker } from 'node:cluster'
import { once } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'

/** What a worker tells once: where it listens, or why it cannot. */
export interface WorkerReport {
  readonly listening?: Listening
  readonly failed?: string
}
export interface Listening {
  readonly url: string
  /** What can be tried. */
  readonly lines: string[]
}

export interface FleetOptions {
  readonly size: number
  readonly env: Readonly<Record<string, string>>
  readonly say: (line: string) => void
}

// A worker that dies as soon as it is started is started this often, not as often as it can be.
const LEAST_LIFE_MILLIS = 1000
// Longer than an app takes to close.
const STOP_WITHIN_MILLIS = 15_000

/** So many workers: one that dies is replaced, until they are stopped. */
export class Fleet {
  readonly #options: FleetOptions
  readonly #stopping = new AbortController()

  constructor(options: FleetOptions) {
    this.#options = options
  }

  /** Resolves when all listen, and from then on keeps their number. @throws what the first one that cannot says. */
  async start(signal: AbortSignal): Promise<Listening> {
    // The first one alone: what is wrong with one is wrong with all, and need be said only once.
    const first = cluster.fork(this.#options.env)
    const listening = await readiness(first, signal)
    const others = Array.from({ length: this.#options.size - 1 }, () => cluster.fork(this.#options.env))
    await Promise.all(others.map((worker) => readiness(worker, signal)))
    for (const worker of [first, ...others]) void this.#keep(worker)
    return listening
  }

  /** Resolves when all have ended. One that does not end by itself is killed. */
  async stop(): Promise<void> {
    this.#stopping.abort()
    await Promise.all(Object.values(cluster.workers ?? {}).map((worker) => worker && stopWorker(worker)))
  }

  /** One place in the fleet, and who takes it one after the other. */
  async #keep(first: Worker): Promise<void> {
    const { signal } = this.#stopping
    const { env, say } = this.#options
    for (let worker = first; ; worker = cluster.fork(env)) {
      const since = performance.now()
      const reports: WorkerReport[] = []
      worker.on('message', (report: WorkerReport) => reports.push(report))
      const ending = await endOf(worker)
      if (signal.aborted) return
      const failed = reports.find((report) => report.failed !== undefined)?.failed
      say(`Worker ${worker.process.pid} ended with ${ending}, another takes its place${failed ? `: ${failed}` : ''}`)
      const rest = LEAST_LIFE_MILLIS - (performance.now() - since)
      if (rest > 0) await pause(rest, undefined, { signal }).catch(() => {})
      if (signal.aborted) return
    }
  }
}

async function readiness(worker: Worker, signal: AbortSignal): Promise<Listening> {
  signal.throwIfAborted()
  const { listening, failed } = await Promise.race([
    once(worker, 'message').then(([report]) => report as WorkerReport),
    // What it has said last comes before that.
    once(worker, 'disconnect')
      .then(() => endOf(worker))
      .then((ending): WorkerReport => ({ failed: `A worker ended with ${ending}` })),
    once(signal, 'abort').then((): WorkerReport => ({})),
  ])
  signal.throwIfAborted()
  if (!listening) throw new Error(failed)
  return listening
}

/** Resolves with the exit code or the signal, in words. */
async function endOf(worker: Worker): Promise<string> {
  const { exitCode, signalCode } = worker.process
  const [code, signal] = worker.isDead() ? [exitCode, signalCode] : await once(worker, 'exit')
  return signal ? String(signal) : `code ${code}`
}

async function stopWorker(worker: Worker): Promise<void> {
  const ended = endOf(worker)
  // One that is just ending hears nothing more.
  if (worker.isConnected()) worker.send('stop', () => {})
  const impatience = setTimeout(() => worker.process.kill('SIGKILL'), STOP_WITHIN_MILLIS)
  await ended
  clearTimeout(impatience)
}
