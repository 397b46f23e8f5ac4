/** What a process of the benchmark can be asked, by name. */
export type Calls = Record<string, (argument: never) => unknown>

export interface Question {
  readonly id: number
  readonly name: string
  readonly argument: unknown
}

/** The first message of a process says that it is ready; all others answer a question. */
export type Message = { ready: unknown } | { id: number; value: unknown } | { id: number; failure: string }

/** Called by a process that `Processes` has started: tells that it is ready, and answers questions from then on. */
export function serveParent(calls: Calls, ready?: unknown): void {
  // Ctrl-C reaches the whole process group. It is for the parent, which ends this process when it has no more use for it.
  for (const signal of ['SIGINT', 'SIGHUP'] as const) process.on(signal, () => {})
  process.on('disconnect', () => process.exit())
  // It may have gone while this process was starting.
  if (!process.connected) process.exit()
  process.on('message', (question: Question) => void answer(calls, question))
  send({ ready })
}

/** What `Processes.start` was given for this process. */
export function argumentOfParent<T>(): T {
  return JSON.parse(process.argv[2] ?? 'null') as T
}

async function answer(calls: Calls, { id, name, argument }: Question): Promise<void> {
  try {
    send({ id, value: await calls[name]?.(argument as never) })
  } catch (error) {
    send({ id, failure: error instanceof Error ? (error.stack ?? error.message) : String(error) })
  }
}

function send(message: Message): void {
  if (process.connected) process.send?.(message)
}
