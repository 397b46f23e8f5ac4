import { saidByPooler } from './behind-pooler.ts'

/** Of an attempt to open a connection that failed. */
export interface Reason {
  readonly kind:
    | 'refused'
    | 'dns'
    | 'silent'
    | 'starting'
    | 'credentials'
    | 'database'
    | 'tls'
    | 'idle-timeout'
    | 'lost'
    | 'pooler'
    | 'other'
  /** For a person: what happened, and what to do about it. */
  readonly sentence: string
}

/** `too_many_connections`: of the server, the database or the role. */
export function isServerFull(error: Error): boolean {
  return codeOf(error) === '53300'
}

/** Whose limit it was. The server's text may be in any language, the names of its functions are not. */
export function fullOf(error: Error): 'role' | 'database' | 'server' {
  const { routine } = error as { routine?: string }
  if (routine === 'InitializeSessionUserId') return 'role'
  return routine === 'CheckMyDatabase' ? 'database' : 'server'
}

const codeOf = (error: unknown): string => String((error as { code?: unknown } | undefined)?.code ?? '')

const KINDS: readonly [Reason['kind'], RegExp, string][] = [
  [
    'refused',
    /^(ECONNREFUSED|ENOENT)$/,
    'nobody listens at its address: is PostgreSQL running, and are host and port right?',
  ],
  [
    'dns',
    /^(ENOTFOUND|EAI_\w+)$/,
    'the name of its host is not known (DNS): is the host in the connection string right?',
  ],
  [
    'silent',
    /^(ETIMEDOUT|EHOSTUNREACH|ENETUNREACH|EHOSTDOWN)$/,
    'it does not answer: look for a firewall, a wrong address, or a server that is frozen or overloaded',
  ],
  ['starting', /^57P03$/, 'it is starting up or shutting down: it will be back by itself, or look into its log'],
  [
    'credentials',
    /^(28\w{3})$/,
    'it refuses the user or the password: check the connection string, where its values come from, and pg_hba.conf',
  ],
  ['database', /^3D000$/, 'the database does not exist on this server: check its name in the connection string'],
  ['tls', /CERT|TLS|SSL|SIGNATURE/, 'TLS could not be agreed on: check the certificate and the option connection.ssl'],
  [
    'idle-timeout',
    /^25P03$/,
    'the server ended it because its transaction was idle for longer than idle_in_transaction_session_timeout: do slow work ' +
      'before the first statement, or await request.db.commit() before it',
  ],
  [
    'lost',
    // 40001: of a hot standby, to a session that was idle in the way of what it had to replay.
    /^(ECONNRESET|EPIPE|08\w{3}|57P0\w|25P04|40001)$/,
    'the connection was cut: by a restart, an administrator, a time limit of the server, a conflict with the replay of a ' +
      'standby, a failover or something in between',
  ],
]
// Errors of pg and of ours that bear no code.
const TEXTS: readonly [Reason['kind'], RegExp][] = [
  ['silent', /timeout|no answer|not answer|timed out/i],
  ['credentials', /password|SASL|authentication/i],
  ['tls', /\bSSL\b|\bTLS\b|certificate/i],
  ['refused', /ECONNREFUSED/],
  ['dns', /ENOTFOUND|EAI_/],
  ['lost', /terminated|reset|closed|ended/i],
]

/** What an error that comes from connecting means, or, if `isLost`, from the loss of a connection that was open. */
export function reasonOf(error: Error, isLost = false): Reason {
  const code = codeOf(error)
  const byCode = KINDS.find(([, pattern]) => pattern.test(code))
  const byText = TEXTS.find(([, pattern]) => pattern.test(error.message))
  const byPooler = saidByPooler(error)
  const kind = byPooler ? 'pooler' : (byCode?.[0] ?? byText?.[0] ?? 'other')
  const what = byPooler ?? KINDS.find(([one]) => one === kind)?.[2] ?? `the attempt failed: ${error.message}`
  const isCut = kind === 'lost' && !isLost
  const start = isLost ? 'A connection to PostgreSQL was lost' : 'PostgreSQL cannot be reached'
  const sentence = isCut
    ? 'whatever listens at its address hangs up at once: is it PostgreSQL, or on its way down?'
    : what
  return { kind, sentence: `${start}: ${sentence}${code === '' ? '' : ` (${code})`}` }
}
