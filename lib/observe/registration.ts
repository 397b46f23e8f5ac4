import type { FastifyInstance } from 'fastify'
import { InvalidOption } from '../errors.ts'
import { ownOptions } from '../own-options.ts'
import type { ObservedPool } from './snapshot.ts'

export interface Check {
  readonly isNeeded?: boolean
  readonly expected: string
  readonly test: (value: unknown) => boolean
}

/** What `decorator` may be, for all plugins that look at a pool. */
export const decoratorCheck: Check = {
  expected: 'a name',
  test: (value) => typeof value === 'string' && /^[A-Za-z_$][\w$]*$/.test(value),
}
// Fastify hands its own options of `register` to the plugin too.
const FASTIFYS = new Set(['prefix', 'logLevel', 'logSerializers'])

/** Checks the options of a plugin that looks at a pool, and returns those that are its own. @throws INVALID_OPTION */
export function checkObserverOptions<Options extends object>(
  given: Options,
  checks: Readonly<Record<string, Check>>,
): Options {
  const input = ownOptions(given)
  for (const name of Object.keys(input)) {
    if (Object.hasOwn(checks, name) || FASTIFYS.has(name)) continue
    throw new InvalidOption(name, `one of ${Object.keys(checks).join(', ')}`, 'an unknown name')
  }
  for (const [name, { isNeeded, expected, test }] of Object.entries(checks)) {
    const value = (input as Record<string, unknown>)[name]
    if (value === undefined && !isNeeded) continue
    if (!test(value)) throw new InvalidOption(name, expected, value === undefined ? 'nothing' : show(value))
  }
  return input
}

/** The pool behind `fastify[decorator]`. @throws INVALID_OPTION */
export function poolOf(fastify: FastifyInstance, decorator: string): ObservedPool {
  const db = (fastify as unknown as Record<string, { pool?: ObservedPool } | undefined>)[decorator]
  if (typeof db?.pool?.snapshot === 'function') return db.pool
  throw new InvalidOption(
    'decorator',
    'the `decorator` of a fastify-request-db that is registered before this plugin, and not in a sibling',
    `'${decorator}'`,
  )
}

const show = (value: unknown): string => {
  if (value === null || typeof value === 'number' || typeof value === 'boolean') return String(value)
  return typeof value === 'string' ? `'${value}'` : `a value of type ${typeof value}`
}
