import type { FastifyRequest } from 'fastify'
import { InvalidOption } from '../errors.ts'

/** Options of `fastify.register(requestDbDashboard, options)`. */
export interface DashboardOptions {
  /** Where the page is, such as `/db`. Needed. */
  path: string
  /** The `decorator` of the pool that is shown. Default `'db'`. */
  decorator?: string | undefined
  /**
   * Whether this request may see the page; only `true` lets it in, what it throws is an answer like any other error.
   * Default: only who comes from this machine itself, to it by the name of localhost, and through no proxy.
   */
  allow?: ((request: FastifyRequest) => boolean | Promise<boolean>) | undefined
  /** Time between two updates of an open page, in milliseconds, from 100 to 60 000. Default 500. */
  intervalMillis?: number | undefined
}

interface Check {
  readonly expected: string
  readonly test: (value: unknown) => boolean
}

const checks: Record<string, Check> = {
  path: {
    expected: "a path such as '/db', of letters, digits and . _ ~ -",
    test: (value) => typeof value === 'string' && /^(\/|(\/[\w.~-]+)+\/?)$/.test(value),
  },
  decorator: { expected: 'a name', test: (value) => typeof value === 'string' && /^[A-Za-z_$][\w$]*$/.test(value) },
  allow: { expected: 'a function (request) => boolean', test: (value) => typeof value === 'function' },
  intervalMillis: {
    expected: 'a whole number of milliseconds from 100 to 60000',
    test: (value) => Number.isInteger(value) && (value as number) >= 100 && (value as number) <= 60_000,
  },
}
// Fastify hands its own options of `register` to the plugin too.
const FASTIFYS = new Set(['prefix', 'logLevel', 'logSerializers'])

const show = (value: unknown): string =>
  typeof value === 'string'
    ? `'${value}'`
    : typeof value === 'number'
      ? String(value)
      : `a value of type ${typeof value}`

/** Checks the options and fills in the defaults. @throws INVALID_OPTION */
export function checkDashboardOptions(input: DashboardOptions) {
  const named: Record<string, unknown> = { ...input, path: input.path }
  for (const [name, value] of Object.entries(named)) {
    const rule = Object.hasOwn(checks, name) ? checks[name] : undefined
    if (rule === undefined) {
      if (FASTIFYS.has(name)) continue
      throw new InvalidOption(name, `one of ${Object.keys(checks).join(', ')}`, 'an unknown name')
    }
    if (value === undefined && name !== 'path') continue
    if (!rule.test(value)) throw new InvalidOption(name, rule.expected, value === undefined ? 'nothing' : show(value))
  }
  const { path, decorator = 'db', allow, intervalMillis = 500 } = input
  return { path: path.replace(/\/$/, ''), decorator, allow, intervalMillis }
}
