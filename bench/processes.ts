import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { Calls, Message } from './child.ts'

const ENDS_WITHIN_MILLIS = 3000

interface Waiting {
  resolve(value: never): void
  reject(error: Error): void
}

/** A process of the benchmark, which `serveParent` has made ready for questions. */
export class Child<C extends Calls, Ready = undefined> {
  readonly #process: ChildProcess
  readonly #waiting = new Map<number, Waiting>()
  readonly #ready: Promise<Ready>
  #questions = 0
  #ended: Error | undefined

  constructor(script: string, argument: unknown, name: string) {
    this.#process = fork(fileURLToPath(new URL(script, import.meta.url)), [JSON.stringify(argument)], {
      execArgv: ['--import=tsx'],
      // Response times are sent as typed arrays.
      serialization: 'advanced',
    })
    // What it says when it is ready has no question, and so the number 0.
    this.#ready = new Promise((resolve, reject) => this.#waiting.set(0, { resolve, reject }))
    this.#process.on('message', (message: Message) => this.#receive(message))
    this.#process.once('error', (error) => this.#fail(error))
    this.#process.once('exit', (code, signal) => this.#fail(new Error(`${name} ended with ${signal ?? code}`)))
  }

  /** What it said when it was ready. */
  get ready(): Promise<Ready> {
    return this.#ready
  }

  /** Rejects when the call fails there, or the process ends. */
  ask<K extends keyof C & string>(name: K, ...[argument]: Parameters<C[K]>): Promise<Awaited<ReturnType<C[K]>>> {
    if (this.#ended) return Promise.reject(this.#ended)
    const id = ++this.#questions
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject })
      this.#process.send({ id, name, argument }, (error) => error && this.#settle(id)?.reject(error))
    })
  }

  async stop(): Promise<void> {
    const { exitCode, signalCode, pid } = this.#process
    if (pid === undefined || exitCode !== null || signalCode !== null) return
    const ended = once(this.#process, 'exit')
    const impatience = setTimeout(() => this.#process.kill('SIGKILL'), ENDS_WITHIN_MILLIS)
    if (this.#process.connected) this.#process.disconnect()
    await ended
    clearTimeout(impatience)
  }

  #receive(message: Message): void {
    if ('ready' in message) this.#settle(0)?.resolve(message.ready as never)
    else if ('failure' in message) this.#settle(message.id)?.reject(new Error(message.failure))
    else this.#settle(message.id)?.resolve(message.value as never)
  }

  #settle(id: number): Waiting | undefined {
    const waiting = this.#waiting.get(id)
    this.#waiting.delete(id)
    return waiting
  }

  #fail(error: Error): void {
    this.#ended = error
    for (const id of [...this.#waiting.keys()]) this.#settle(id)?.reject(error)
  }
}

/** Everything that was started, so that it can be stopped whatever happens. */
export class Processes {
  readonly #children = new Set<Child<Calls, unknown>>()
  #stopped = false

  /** `name` is what it is called when it fails. */
  async start<C extends Calls, Ready = undefined>(
    script: string,
    argument: unknown = null,
    name = script,
  ): Promise<Child<C, Ready>> {
    if (this.#stopped) throw new Error('The benchmark is being stopped')
    const child = new Child<C, Ready>(script, argument, name)
    this.#children.add(child as unknown as Child<Calls, unknown>)
    await child.ready
    return child
  }

  /** Questions that are not answered yet are rejected. */
  async stop(): Promise<void> {
    this.#stopped = true
    await Promise.all([...this.#children].map((child) => child.stop()))
  }
}
