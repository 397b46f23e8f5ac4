/** What of the core's tests goes through PgBouncer where TEST_POOLER says so, and what makes no sense there. */

/** TEST_POOLER=pgbouncer: `createDatabase` leads through a PgBouncer of its own, and `buildApp` is told so. */
export const isThroughPooler = process.env.TEST_POOLER === 'pgbouncer'

/** The files that are run. */
export const THROUGH_POOLER = [
  'test/session/*.ts',
  'test/lifecycle/*.ts',
  'test/lifecycle.ts',
  'test/request-session.ts',
  'test/database.ts',
  'test/index.ts',
  'test/faults/model.ts',
  'test/pool/bad-statements.ts',
  'test/pool/soak.ts',
  'test/support/through-pooler.test.ts',
]

/** Of these files, the tests that are left out, and why. */
const LEFT_OUT: readonly (readonly [RegExp, string])[] = [
  [
    /^idle backends that are killed cost nobody/,
    "PgBouncer's backends are not the pool's: nothing of the pool's is killed",
  ],
  [
    /^LISTEN and NOTIFY through the raw client/,
    'LISTEN is of the server connection, which is not the session’s for long',
  ],
  [/^a connection that is being pinged for who has left/, 'there is no ping'],
  [/^ping fails where there is no server, and where it is silent/, 'asks for pool.prePing'],
  [/^snapshot says who holds what and who waits/, 'compares pids with those of PostgreSQL'],
  [/^\d+ scenarios \(\w+, discard\)/, "resetOnReturn: 'discard' is refused"],
  [/^a hundred requests side by side on one pipelined socket/, 'registers the plugin by hand, without the option'],
]

/** Why a test is not run; undefined where it is. */
export function leftOutBecause(name: string): string | undefined {
  if (!isThroughPooler) return undefined
  return LEFT_OUT.find(([pattern]) => pattern.test(name))?.[1]
}
