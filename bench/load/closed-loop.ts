import autocannon from 'autocannon'
import { ITEMS } from '../items.ts'
import { type Question, question, type Subject } from '../questions.ts'

/** Clients of which each asks again as soon as it is answered. */
export interface ClosedLoop {
  readonly port: number
  readonly subject: Subject
  readonly clients: number
  /** At first answers are checked, but neither counted nor timed. */
  readonly warmUpMillis: number
  readonly millis: number
  /** The round: each begins with other items. */
  readonly round: number
}

export interface ClosedOutcome {
  /** Answers in the time that counts. */
  readonly perSecond: number
  /** How long requests took that were under way in the time that counts, in milliseconds. */
  readonly times: Float64Array
  /** Requests of the whole load. After its end all that were under way have been waited for. */
  readonly asked: number
  readonly answered: number
  readonly right: number
  /** The items of the right answers, added up. */
  readonly sum: number
  /** The first wrong answer. */
  readonly complaint?: string
  /** Share of one core that this process needed. */
  readonly loadCpu: number
}

/** What autocannon's client knows of itself: it leaves when it wants to ask again and has reached the maximum. */
interface Leaving {
  readonly reqsMade: number
  responseMax: number
}

const ITEMS_EACH = 24
const TIMEOUT_SECONDS = 10

/** The client's own items: no two clients update the same one. */
export function itemsOf(client: number, { clients, round }: Pick<ClosedLoop, 'clients' | 'round'>): number[] {
  const first = round * ITEMS_EACH
  const mine = Math.floor(ITEMS / clients)
  return Array.from({ length: Math.min(ITEMS_EACH, mine) }, (_, step) => ((first + step) % mine) * clients + client + 1)
}

export async function closedLoop(load: ClosedLoop): Promise<ClosedOutcome> {
  const tally = new Tally()
  const clients: (autocannon.Client & Leaving)[] = []
  const cpuBefore = process.cpuUsage()
  const instance = autocannon({
    url: `http://127.0.0.1:${load.port}`,
    connections: load.clients,
    timeout: TIMEOUT_SECONDS,
    // It ends when the last client has left, which it looks for this often.
    sampleInt: 20,
    duration: (load.warmUpMillis + load.millis) / 1000 + 3 * TIMEOUT_SECONDS,
    skipAggregateResult: true,
    setupClient: (client) => {
      const requests = itemsOf(clients.length, load).map((id) => tally.request(question(load.subject, id), id))
      clients.push(client as autocannon.Client & Leaving)
      // The types do not know of this event: autocannon counts its requests by it.
      client.on('request' as 'response', () => tally.asked++)
      client.on('response', (_status, _bytes, millis) => tally.time(millis))
      client.setRequests(requests)
    },
  })
  const start = performance.now()
  tally.countFrom = start + load.warmUpMillis
  tally.countUntil = tally.countFrom + load.millis
  const leave = () => {
    for (const client of clients) client.responseMax = client.reqsMade
  }
  setTimeout(leave, load.warmUpMillis + load.millis)
  await instance
  const { user, system } = process.cpuUsage(cpuBefore)
  return tally.outcome(load.millis, (user + system) / 1000 / (performance.now() - start))
}

class Tally {
  countFrom = Number.POSITIVE_INFINITY
  countUntil = Number.POSITIVE_INFINITY
  asked = 0
  #times: number[] = []
  #counted = 0
  #answered = 0
  #right = 0
  #sum = 0
  #complaint: string | undefined

  request({ method, path, body, status, isRight }: Question, id: number): autocannon.Request {
    const onResponse = (got: number, answer: string) => {
      this.#answered++
      if (got === status && isRight(answer)) {
        this.#right++
        this.#sum += id
      } else {
        this.#complaint ??= `${method} ${path} answered ${got} ${answer.slice(0, 200)}`
      }
    }
    return { method, path, body, headers: body ? { 'content-type': 'application/json' } : {}, onResponse }
  }

  time(millis: number): void {
    const now = performance.now()
    if (now < this.countFrom) return
    if (now < this.countUntil) this.#counted++
    // Those that are waited for at the end belong to it: without them a server that lets some starve would look fast.
    this.#times.push(millis)
  }

  outcome(millis: number, loadCpu: number): ClosedOutcome {
    const counted = {
      perSecond: (this.#counted / millis) * 1000,
      times: Float64Array.from(this.#times),
      asked: this.asked,
      answered: this.#answered,
      right: this.#right,
      sum: this.#sum,
      loadCpu,
    }
    return this.#complaint === undefined ? counted : { ...counted, complaint: this.#complaint }
  }
}
