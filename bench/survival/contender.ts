import type { FastifyInstance, FastifyReply, FastifyRequest, RouteShorthandOptions } from 'fastify'

export type Query = (text: string, values?: readonly unknown[]) => Promise<readonly object[]>

/** What a handler has: its transaction. */
export interface Handle {
  readonly query: Query
  /** A transaction in the transaction. Rejects with what `work` rejects with, when it has been undone. */
  nested(work: (query: Query) => Promise<unknown>): Promise<unknown>
}

export type Handler = (db: Handle, request: FastifyRequest, reply: FastifyReply) => Promise<unknown>

export interface RouteOptions extends RouteShorthandOptions {
  readonly method: 'GET' | 'POST'
  readonly url: string
}

/** How a contender is used, as its documentation shows it. */
export interface Contender {
  /** Declares a route whose handler runs in one transaction. */
  route(options: RouteOptions, handler: Handler): void
  /** Declares a GET that writes the note `streamed` and then answers with a stream of all numbers, read through a cursor. */
  stream(url: string): void
}

export interface ContenderArgument {
  readonly connectionString: string
  readonly size: number
  /** Longest wait for a connection. */
  readonly timeoutMillis: number
  /** The contender's own, such as `{ commitOn: 'onResponse' }`. */
  readonly options: Record<string, unknown>
}

/** What a file in contenders/ exports by default. */
export type Connect = (app: FastifyInstance, argument: ContenderArgument) => Promise<Contender>

export const INSERT = 'insert into notes (note) values ($1)'
const CHUNK = 100

/** For those that have only the statements for it. */
export function nestedByHand(query: Query): Handle['nested'] {
  return async (work) => {
    await query('SAVEPOINT inner_one')
    try {
      const result = await work(query)
      await query('RELEASE inner_one')
      return result
    } catch (error) {
      await query('ROLLBACK TO inner_one')
      throw error
    }
  }
}

/** Reads through a cursor in plain SQL. */
export async function* numbers(query: Query): AsyncGenerator<string> {
  await query('declare numbers_cursor no scroll cursor for select n, filler from numbers')
  for (;;) {
    const rows = await query(`fetch ${CHUNK} from numbers_cursor`)
    if (rows.length === 0) return
    yield rows.map((row) => `${JSON.stringify(row)}\n`).join('')
  }
}
