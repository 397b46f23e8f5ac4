import type { FastifyRequest } from 'fastify'
import { type Check, checkObserverOptions, decoratorCheck } from '../observe/registration.ts'

/** Options of `fastify.register(requestDbDashboard, options)`. */
export interface DashboardOptions {
  /** Where the page is, such as `/db`. Needed. */
  path: string
  /** The `decorator` of the pool that is shown. Default `'db'`. */
  decorator?: string | undefined
  /**
   * Whether this request may see the page; only `true` lets it in, what it throws is an answer like any other error.
   * Default: only who comes from this machine itself, to it by the name of localhost, through no proxy that shows, and
   * from no page of another site.
   */
  allow?: ((request: FastifyRequest) => boolean | Promise<boolean>) | undefined
  /** Time between two updates of an open page, in milliseconds, from 100 to 60 000. Default 500. */
  intervalMillis?: number | undefined
}

const checks: Record<string, Check> = {
  path: {
    isNeeded: true,
    expected: "a path such as '/db', of letters, digits and . _ ~ -",
    test: (value) => typeof value === 'string' && /^(\/|(\/[\w.~-]+)+\/?)$/.test(value),
  },
  decorator: decoratorCheck,
  allow: { expected: 'a function (request) => boolean', test: (value) => typeof value === 'function' },
  intervalMillis: {
    expected: 'a whole number of milliseconds from 100 to 60000',
    test: (value) => Number.isInteger(value) && (value as number) >= 100 && (value as number) <= 60_000,
  },
}
/** Checks the options and fills in the defaults. @throws INVALID_OPTION */
export function checkDashboardOptions(input: DashboardOptions) {
  const { path, decorator = 'db', allow, intervalMillis = 500 } = checkObserverOptions(input, checks)
  return { path: path.replace(/\/$/, ''), decorator, allow, intervalMillis }
}
