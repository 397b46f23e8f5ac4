import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { Count, Entry, Item } from './items.ts'

/** Connections of every contender's pool. */
export const POOL_SIZE = 20

/** What a contender does in the database. Every method is one transaction. */
export interface Work {
  read(id: number, request: FastifyRequest): Promise<Item>
  /** Reads the count, then adds one to it. */
  update(id: number, request: FastifyRequest): Promise<Count>
  insert(entry: Entry, request: FastifyRequest): Promise<void>
  /** Reads several items by their keys, side by side if that can be done in one transaction. */
  readAll(ids: number[], request: FastifyRequest): Promise<Item[]>
  /** Reads, then does something else before the transaction ends. */
  hold(id: number, somethingElse: () => Promise<void>, request: FastifyRequest): Promise<Item>
}

export interface ContenderArgument {
  readonly connectionString: string
  /** The contender's own, such as `{ commitOn: 'onResponse' }`. */
  readonly options: Record<string, unknown>
}

/** What a file in contenders/ exports by default. Without work there is no database. */
export type Contender = (app: FastifyInstance, argument: ContenderArgument) => Promise<Work | undefined>
