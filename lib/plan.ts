import { type Expectation, expect, holdFor, RARELY, serversFor } from './observe/queueing.ts'
import { type Fleet, largestFit, neededBy } from './observe/room.ts'

/** What is known of an app and its server. */
export interface Plan extends Fleet {
  /** Of all processes together: sessions, that is requests that use the database. */
  readonly ratePerSecond: number
  /** How long one holds its connection, on average. */
  readonly holdMillis: number
  readonly timeoutMillis: number
  readonly maxConnections: number
  readonly reserved: number
  readonly others: number
}

/** Whether the pools fit the server and the load, and what to change: lines for a terminal. */
export function plan(input: Plan): string[] {
  const { processes, size, maxOverflow, ratePerSecond, holdMillis, timeoutMillis } = input
  const servers = size + maxOverflow
  const each = ratePerSecond / processes
  const expected = expect({ servers, ratePerSecond: each, holdMillis, timeoutMillis })
  const room = roomOf(input)
  const needed = neededBy(input)
  return [
    `${count(processes, 'worker')}, each with a pool of size ${size} and overflow ${maxOverflow}; ${rate(ratePerSecond)} requests a second in all.`,
    '',
    'Connections on the server',
    ...table([
      ['needed at most', `${needed}`, `${count(processes, 'worker')} x (${size} + ${maxOverflow})`],
      ['it has for them', `${room}`, arithmeticOf(input)],
      needed <= room ? ['spare', `${room - needed}`, ''] : ['missing', `${needed - room}`, ''],
    ]),
    '',
    processes === 1 ? 'What its requests can expect' : 'What the requests of each worker can expect',
    ...table([
      ['in use on average', one(expected.utilization * servers), `of ${servers}: ${usage(input, expected)}`],
      ['utilization', share(expected.utilization), 'of the time, a connection is in use'],
      ['have to wait', share(expected.waitProbability), 'of the requests find no free connection'],
      ['mean wait', millis(expected.meanWaitMillis), 'over all requests, those that do not wait included'],
      ['p95 wait', millis(expected.p95WaitMillis), '19 of 20 requests wait no longer'],
      ['refused', share(expected.timeoutShare), `get no connection within ${millis(timeoutMillis)}: 503`],
    ]),
    '',
    'What to change',
    ...advise(input, expected).flatMap((text) => wrap(text)),
    '',
    'What this rests on',
    ...wrap(
      'Requests are taken to come at random, and to hold a connection for now longer, now shorter, --hold on average. ' +
        'Bursts need more. --hold is from the first statement to COMMIT, whatever else the handler does in between.',
    ),
  ]
}

const roomOf = ({ maxConnections, reserved, others }: Plan) => Math.max(0, maxConnections - reserved - others)

const arithmeticOf = ({ maxConnections, reserved, others }: Plan) =>
  `max_connections ${maxConnections} - ${reserved} reserved - ${others} used by others`

const usage = ({ ratePerSecond, processes, holdMillis }: Plan, { offered }: Expectation) =>
  `${rate(ratePerSecond / processes)} a second x ${millis(holdMillis)} ask for ${one(offered)} at once`

function advise(input: Plan, expected: Expectation): string[] {
  const { processes, size, maxOverflow, ratePerSecond, holdMillis } = input
  const room = roomOf(input)
  const enough = serversFor(ratePerSecond / processes, holdMillis)
  if (processes * enough > room && neededBy(input) > room) return shortOfRoom(input, enough)
  if (neededBy(input) > room) return lower(input, enough)
  if (size + maxOverflow < enough)
    return processes * enough > room ? shortOfRoom(input, enough) : raise(input, expected, enough)
  const spare =
    size > 2 * enough && size > 10
      ? ` Size ${enough} with overflow ${maxOverflow} would do as well, and leave the server more room.`
      : ''
  return [`Nothing: it is fine as it is. The connections fit, and waiting is rare.${spare}`]
}

/** The load would do with less than what does not fit. */
function lower(input: Plan, enough: number): string[] {
  const { processes } = input
  const room = roomOf(input)
  const fit = largestFit(input, room)!
  const servers = fit.size + fit.maxOverflow
  return [
    `The server cannot give ${neededBy(input)} connections: when all are wanted, it refuses some (error 53300).`,
    `Lower each pool to --size ${fit.size} --overflow ${fit.maxOverflow}: then ${processes} x ${servers} = ` +
      `${processes * servers} fit into the ${room}. That is enough for this load, which needs ` +
      `${enough} a worker for waiting to be rare.`,
  ]
}

function raise(input: Plan, expected: Expectation, enough: number): string[] {
  const { processes, maxOverflow, size, ratePerSecond } = input
  const better = Math.max(size, enough - maxOverflow)
  const all = processes * (better + maxOverflow)
  return [
    howBad(expected, size + maxOverflow),
    `Raise each pool to --size ${better} --overflow ${maxOverflow}: ${count(processes, 'worker')} x ` +
      `${better + maxOverflow} = ${all} still fit, and waiting becomes rare (fewer than 1 in ${1 / RARELY} requests).`,
    `Or hold each connection for a shorter time: ${shorter(holdFor(size + maxOverflow, ratePerSecond / processes), input)}`,
  ]
}

const shorter = (enoughMillis: number, { holdMillis }: Plan) =>
  `${millis(floor(enoughMillis))} would do in place of ${millis(holdMillis)}. Commit before slow work, send fewer statements.`

const howBad = ({ offered, timeoutShare, waitProbability }: Expectation, servers: number): string => {
  if (offered >= servers)
    return 'The pools are too small: more is asked of them than they can ever do, so the queue only grows.'
  if (timeoutShare >= NOTICED) return `The pools are too small: ${share(timeoutShare)} of the requests are refused.`
  return `The pools are tight: ${share(waitProbability)} of the requests have to wait.`
}

/** The load needs more than the server has. */
function shortOfRoom(input: Plan, enough: number): string[] {
  const { processes, ratePerSecond, holdMillis, reserved, others } = input
  const room = roomOf(input)
  const fit = largestFit(input, room)
  const shared = serversFor(ratePerSecond, holdMillis)
  return [
    `More connections are needed than the server has: for waiting to be rare this load needs ${enough} a worker, ` +
      `${processes * enough} in all, and there is room for ${room}. One of these helps:`,
    ...(fit ? withWhatFits(input, fit) : ['- Run fewer workers: not even one connection for each fits.']),
    ...(processes > 1 && shared <= room
      ? [`- Put PgBouncer in between, in transaction mode: with one queue for all workers ${shared} connections do.`]
      : []),
    `- Raise max_connections to ${processes * enough + reserved + others} and each pool to ${enough} in all, if the ` +
      'server has the memory and the processors for as many at once.',
  ]
}

function withWhatFits(input: Plan, { size, maxOverflow }: Omit<Fleet, 'processes'>): string[] {
  const { processes, ratePerSecond, holdMillis, timeoutMillis } = input
  const servers = size + maxOverflow
  const each = ratePerSecond / processes
  const fit = `--size ${size} --overflow ${maxOverflow}`
  const { timeoutShare, waitProbability, meanWaitMillis } = expect({
    servers,
    ratePerSecond: each,
    holdMillis,
    timeoutMillis,
  })
  const effect =
    timeoutShare >= NOTICED
      ? `but then ${share(timeoutShare)} of the requests are refused`
      : `if ${share(waitProbability)} of the requests may wait, ${millis(meanWaitMillis)} on average over all`
  return [
    `- Hold each connection for a shorter time: with ${fit}, ${shorter(holdFor(servers, each), input)}`,
    `- Or take ${fit}, the most that fits, ${effect}.`,
  ]
}

// What is refused less often than this need not be spoken of.
const NOTICED = 0.0005

const count = (number: number, what: string) => `${number} ${what}${number === 1 ? '' : 's'}`
const one = (number: number) => (number >= 100 ? number.toFixed(0) : number.toFixed(1))
const rate = (number: number) => String(Math.round(number * 10) / 10)
// Rounded down to two figures: what is promised has to hold.
const floor = (number: number) => {
  const step = 10 ** (Math.floor(Math.log10(number)) - 1)
  return Math.floor(number / step) * step
}

function share(part: number): string {
  const percent = part * 100
  if (percent === 0 || percent === 100) return `${percent} %`
  if (percent < 0.1) return '< 0.1 %'
  if (percent > 99.9) return '> 99.9 %'
  return `${percent.toFixed(percent < 10 || percent > 90 ? 1 : 0)} %`
}

function millis(number: number): string {
  if (number === 0) return '0 ms'
  if (number < 0.1) return '< 0.1 ms'
  if (number < 10) return `${Math.round(number * 10) / 10} ms`
  return number < 1000 ? `${Math.round(number)} ms` : `${Math.round(number / 10) / 100} s`
}

function table(rows: [string, string, string][]): string[] {
  const widths = [0, 1].map((column) => Math.max(...rows.map((row) => row[column]!.length)))
  return rows.map(([name, value, note]) => {
    return `  ${name.padEnd(Math.max(17, widths[0]!))}  ${value.padStart(Math.max(8, widths[1]!))}   ${note}`.trimEnd()
  })
}

const WIDTH = 84

function wrap(text: string): string[] {
  const hang = text.startsWith('- ') ? '    ' : '  '
  const lines: string[] = []
  let line = ' '
  for (const word of text.split(' ')) {
    if (line.length + 1 + word.length > WIDTH) {
      lines.push(line)
      line = hang.slice(1)
    }
    line += ` ${word}`
  }
  return [...lines, line]
}
