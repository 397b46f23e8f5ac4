import { Agent, get, type IncomingMessage } from 'node:http'
import { ITEMS } from '../items.ts'
import { question, type Subject } from '../questions.ts'

/** Requests at fixed times, whether earlier ones are answered or not. (autocannon's clients wait for their answers.) */
export interface OpenLoop {
  readonly port: number
  readonly subject: Subject
  readonly perSecond: number
  /** At first answers are checked, but not counted. */
  readonly warmUpMillis: number
  readonly millis: number
}

/** What became of the requests. Those that were not answered by the end are given up. */
export interface OpenOutcome {
  /** Requests in the time that counts. */
  readonly asked: number
  /** Times of the answers in it, in milliseconds from when the request was due. */
  readonly served: Float64Array
  /** Those of the refusals, with 503. */
  readonly refused: Float64Array
  /** All other answers and broken connections, of the whole load. */
  readonly wrong: number
  /** The first of them. */
  readonly complaint: string | undefined
}

const TICK_MILLIS = 1

export async function openLoop(load: OpenLoop): Promise<OpenOutcome> {
  const tally = new Tally(load, performance.now())
  const agent = new Agent({ keepAlive: true, maxSockets: Number.POSITIVE_INFINITY })
  await new Promise<void>((resolve) => {
    let asked = 0
    const timer = setInterval(() => {
      const now = performance.now()
      for (; tally.dueAt(asked) <= Math.min(now, tally.countUntil); asked++) ask(load, asked, tally, agent)
      if (now < tally.countUntil) return
      clearInterval(timer)
      resolve()
    }, TICK_MILLIS)
  })
  const outcome = tally.outcome()
  agent.destroy()
  return outcome
}

function ask({ port, subject }: OpenLoop, index: number, tally: Tally, agent: Agent): void {
  const { path, status, isRight } = question(subject, (index % ITEMS) + 1)
  const dueAt = tally.ask(index)
  const failed = (error: Error) => tally.complain(`GET ${path} failed: ${error.message}`)
  const receive = async (response: IncomingMessage) => {
    const body = await text(response)
    if (response.statusCode === 503) tally.refused(dueAt)
    else if (response.statusCode === status && isRight(body)) tally.served(dueAt)
    else tally.complain(`GET ${path} answered ${response.statusCode} ${body.slice(0, 200)}`)
  }
  get({ port, host: '127.0.0.1', path, agent }, (response) => void receive(response).catch(failed)).on('error', failed)
}

class Tally {
  readonly countUntil: number
  readonly #start: number
  readonly #countFrom: number
  readonly #intervalMillis: number
  readonly #served: number[] = []
  readonly #refused: number[] = []
  #asked = 0
  #wrong = 0
  #complaint: string | undefined

  constructor({ warmUpMillis, millis, perSecond }: OpenLoop, start: number) {
    this.#start = start
    this.#countFrom = start + warmUpMillis
    this.countUntil = this.#countFrom + millis
    this.#intervalMillis = 1000 / perSecond
  }

  dueAt(index: number): number {
    return this.#start + index * this.#intervalMillis
  }

  /** Returns when it was due. */
  ask(index: number): number {
    const dueAt = this.dueAt(index)
    if (dueAt >= this.#countFrom) this.#asked++
    return dueAt
  }

  served(dueAt: number): void {
    this.#count(this.#served, dueAt)
  }

  refused(dueAt: number): void {
    this.#count(this.#refused, dueAt)
  }

  /** What is given up at the end has not failed. */
  complain(what: string): void {
    if (performance.now() >= this.countUntil) return
    this.#wrong++
    this.#complaint ??= what
  }

  outcome(): OpenOutcome {
    return {
      asked: this.#asked,
      served: Float64Array.from(this.#served),
      refused: Float64Array.from(this.#refused),
      wrong: this.#wrong,
      complaint: this.#complaint,
    }
  }

  #count(times: number[], dueAt: number): void {
    const now = performance.now()
    if (now >= this.#countFrom && now < this.countUntil) times.push(now - dueAt)
  }
}

async function text(response: IncomingMessage): Promise<string> {
  response.setEncoding('utf8')
  let body = ''
  for await (const chunk of response) body += chunk
  return body
}
