import { type ChildProcess, fork } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import type { Message } from '../child.ts'
import type { AppArgument, AppCalls } from './app.ts'

interface Waiting {
  resolve(value: never): void
  reject(error: Error): void
}

/** A contender's process. That it dies is a result like others. */
export class Subject {
  readonly #process: ChildProcess
  readonly #waiting = new Map<number, Waiting>()
  #questions = 0
  /** Resolves with its exit code or the signal that ended it. */
  readonly ended: Promise<string>
  #alive = true
  #port = 0
  #said = ''

  private constructor(argument: AppArgument) {
    this.#process = fork(fileURLToPath(new URL('./app.ts', import.meta.url)), [JSON.stringify(argument)], {
      execArgv: ['--import=tsx'],
      serialization: 'advanced',
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    })
    this.#process.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#said += text
    })
    this.#process.on('message', (message: Message) => this.#receive(message))
    this.ended = once(this.#process, 'exit').then(([code, signal]) => {
      this.#alive = false
      for (const { reject } of this.#waiting.values()) reject(new Error(`The process has ended\n${this.#said}`))
      this.#waiting.clear()
      return String(signal ?? code)
    })
  }

  /** Listens when this resolves. */
  static async start(argument: AppArgument): Promise<Subject> {
    const subject = new Subject(argument)
    // What it says when it is ready has no question, and so the number 0.
    subject.#port = await new Promise<number>((resolve, reject) => subject.#waiting.set(0, { resolve, reject }))
    return subject
  }

  get alive(): boolean {
    return this.#alive
  }

  get port(): number {
    return this.#port
  }

  /** Rejects when the process ends. */
  ask<K extends keyof AppCalls>(
    name: K,
    ...[argument]: Parameters<AppCalls[K]>
  ): Promise<Awaited<ReturnType<AppCalls[K]>>> {
    if (!this.#alive) return Promise.reject(new Error(`The process has ended\n${this.#said}`))
    const id = ++this.#questions
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject })
      this.#process.send({ id, name, argument }, (error) => error && reject(error))
    })
  }

  terminate(): void {
    this.#process.kill('SIGTERM')
  }

  async stop(): Promise<void> {
    this.#process.kill('SIGKILL')
    await this.ended
  }

  #receive(message: Message): void {
    const id = 'ready' in message ? 0 : message.id
    const waiting = this.#waiting.get(id)
    this.#waiting.delete(id)
    if ('failure' in message) waiting?.reject(new Error(message.failure))
    else waiting?.resolve(('ready' in message ? message.ready : message.value) as never)
  }
}
