import type { FastifyBaseLogger } from 'fastify'
import type { Echo } from '../options.ts'
import { type Events, listen } from './channels.ts'
import type { ObservedPool, Who } from './snapshot.ts'

interface EchoOptions {
  readonly echo: Echo
  readonly echoPool: Echo
  /** Shows parameters, which are the app's secrets. */
  readonly echoParameters: boolean
}

type Listeners = { [Name in keyof Events]?: (event: Events[Name]) => void }

const MOST_TEXT = 2000
const MOST_ROWS = 10

/** Logs what happens in one pool, in SQLAlchemy's words. Returns how to stop it. SQLAlchemy: `echo`, `echo_pool`. */
export function echoTo(pool: ObservedPool, { echo, echoPool, echoParameters }: EchoOptions): () => void {
  if (echo === false && echoPool === false) return () => {}
  return listen(pool, {
    ...(echo !== false && echoOfSessions(echo === 'debug', echoParameters)),
    ...(echoPool !== false && echoOfPool(echoPool === 'debug')),
  })
}

function echoOfSessions(showsRows: boolean, showsParameters: boolean): Listeners {
  return {
    begin: ({ log, who, pid, text, isImplicit }) => {
      say(log, 'begin', { ...routeOf(who), pid }, isImplicit ? `${text} (implicit)` : text)
    },
    statement: ({ log, who, pid, text, millis, rowCount, error, parameters, rows }) => {
      const sqlState = stateOf(error)
      const counted = rowCount === undefined ? '' : `, ${many(rowCount, 'row')}`
      const outcome = error === undefined ? counted : `, failed: ${sqlState ?? error.message}`
      const fields = { ...routeOf(who), pid, statement: cut(text), millis: round(millis), rowCount, sqlState }
      const secrets = {
        ...(showsParameters && { parameters: parameters.map(plain) }),
        ...(showsRows && { rows: rows?.slice(0, MOST_ROWS).map(plainRow) }),
      }
      say(log, 'statement', { ...fields, ...secrets }, `${cut(text)} [${round(millis)} ms${outcome}]`)
    },
    commit: (event) => sayEnd('commit', 'COMMIT', event),
    rollback: (event) => sayEnd('rollback', 'ROLLBACK', event),
  }
}

function sayEnd(name: string, command: string, { log, who, pid, millis, error }: Events['commit']): void {
  const sqlState = stateOf(error)
  const failure = error === undefined ? '' : ` failed: ${sqlState ?? error.message}`
  say(log, name, { ...routeOf(who), pid, millis: round(millis), sqlState }, `${command}${failure}`)
}

function echoOfPool(showsWaits: boolean): Listeners {
  const numbers = new Numbers()
  return {
    connect: ({ log, pid, millis, error }) => {
      if (pid === undefined) say(log, 'connect', { millis: round(millis) }, `connection not opened: ${error?.message}`)
      else sayOf(log, 'connect', numbers.of(pid), pid, { millis: round(millis) }, 'opened')
    },
    checkout: ({ log, who, pid, waitedMillis, isHandedOver }) => {
      const how = isHandedOver ? ' (handed over)' : ''
      const fields = { ...routeOf(who), waitedMillis: round(waitedMillis), isHandedOver }
      sayOf(log, 'checkout', numbers.of(pid), pid, fields, `checked out${how}`)
    },
    checkin: ({ log, who, pid, heldMillis, busyMillis, statements, isHandedOver }) => {
      const fields = { ...routeOf(who), heldMillis: round(heldMillis), busyMillis: round(busyMillis), statements }
      sayOf(log, 'checkin', numbers.of(pid), pid, fields, isHandedOver ? 'returned (handed over)' : 'returned')
    },
    reset: ({ log, who, pid }) => sayOf(log, 'reset', numbers.of(pid), pid, routeOf(who), 'rollback on return'),
    close: ({ log, pid, why }) => {
      sayOf(log, 'close', numbers.end(pid), pid, { why }, why === 'recycled' ? 'recycled' : `closed (${why})`)
    },
    invalidate: ({ log, pid, error }) => {
      const why = error === undefined ? '' : `: ${error.message}`
      sayOf(log, 'invalidate', numbers.end(pid), pid, { sqlState: stateOf(error) }, `invalidated${why}`)
    },
    ...(showsWaits && {
      wait: ({ log, who, waitedMillis, outcome }) => {
        const fields = { ...routeOf(who), waitedMillis: round(waitedMillis), outcome }
        say(log, 'wait', fields, `waited ${round(waitedMillis)} ms for a connection: ${outcome}`)
      },
    }),
  }
}

/** Small numbers for connections, in the order of their opening. */
class Numbers {
  readonly #numbers = new Map<number, number>()
  #last = 0

  of(pid: number): number {
    const number = this.#numbers.get(pid) ?? ++this.#last
    this.#numbers.set(pid, number)
    return number
  }

  end(pid: number): number {
    const number = this.of(pid)
    this.#numbers.delete(pid)
    return number
  }
}

function say(log: FastifyBaseLogger, event: string, fields: object, message: string): void {
  log.info({ requestDb: { event, ...fields } }, message)
}

function sayOf(log: FastifyBaseLogger, event: string, number: number, pid: number, fields: object, what: string): void {
  say(log, event, { connection: number, pid, ...fields }, `connection ${number} ${what}`)
}

const routeOf = ({ method, route }: Who) => ({ method, route })
const round = (millis: number) => Math.round(millis * 100) / 100
const many = (count: number, what: string) => `${count} ${what}${count === 1 ? '' : 's'}`
const cut = (text: string) => (text.length > MOST_TEXT ? `${text.slice(0, MOST_TEXT)} …` : text)

const stateOf = (error: Error | undefined): string | undefined => {
  const { code } = (error ?? {}) as { code?: unknown }
  return typeof code === 'string' ? code : undefined
}

// JSON knows no bigint, and a Buffer would become a list of numbers.
function plain(value: unknown): unknown {
  if (typeof value === 'bigint') return String(value)
  if (Buffer.isBuffer(value)) return `\\x${value.subarray(0, 100).toString('hex')}`
  return typeof value === 'string' ? cut(value) : value
}

const plainRow = (row: unknown): unknown =>
  typeof row === 'object' && row !== null
    ? Object.fromEntries(Object.entries(row).map(([name, value]) => [name, plain(value)]))
    : plain(row)
