import type { Verdict } from './cause.ts'

const PROTOCOL_VIOLATION = '08P01'

// PgBouncer has one SQLSTATE for all that it says itself: its words tell what it means.
const WORDS: readonly [RegExp, string][] = [
  [
    /no more connections allowed/,
    'PgBouncer takes no more clients: raise max_client_conn to what the pools of all processes can open',
  ],
  [
    /query_wait_timeout/,
    'none of the server connections of PgBouncer came free within its query_wait_timeout: hold connections for a shorter ' +
      'time, or raise default_pool_size; see SHOW POOLS',
  ],
  [
    /server_login_retry|server login failed|cannot connect to server|server conn crashed|server_connect_timeout/,
    'PgBouncer itself has no connection to it: look into its log; it tries again every server_login_retry seconds',
  ],
  [
    /[uU]nsupported startup parameter/,
    "PgBouncer refuses a start-up parameter: leave it out, see option pooler: 'transaction', or name it in " +
      'ignore_startup_parameters',
  ],
  [/[ _]timeout$/, 'a time limit of PgBouncer has ended the connection'],
  [/shut.*down|bouncer/, 'PgBouncer is shutting down, or was told to drop its clients'],
]

/** What PgBouncer means; undefined where it was not PgBouncer that said it. */
export function saidByPooler(error: Error): string | undefined {
  if ((error as { code?: unknown }).code !== PROTOCOL_VIOLATION) return undefined
  return WORDS.find(([pattern]) => pattern.test(error.message))?.[1]
}

/** It has waited for a server connection for as long as PgBouncer lets anybody. Once is enough. */
export function hasWaitedInPooler(error: Error): boolean {
  return (error as { code?: unknown }).code === PROTOCOL_VIOLATION && error.message === 'query_wait_timeout'
}

const NOTE =
  '. Behind PgBouncer, waiting for one of its server connections counts as busy: where cl_waiting in SHOW POOLS is not 0, ' +
  'default_pool_size is too small for all processes, or one of them holds its connections for too long'

/** From here the wait in PgBouncer and the work of PostgreSQL look alike. */
export function behindPooler(verdict: Verdict): Verdict {
  const isBusy = verdict.cause === 'slow-sql' || verdict.cause === 'pool-too-small'
  return isBusy ? { ...verdict, sentence: verdict.sentence + NOTE } : verdict
}
