import pg from 'pg'
import { InvalidOption } from './errors.ts'

/** How a pooler between this process and PostgreSQL shares its server connections. PgBouncer: `pool_mode`. */
export type Pooler = 'transaction'

// What of `pg.ClientConfig` goes into the startup message, and is no parameter that PgBouncer knows how to keep. What to
// do instead.
const STARTUP: Readonly<Record<string, string>> = {
  statement_timeout: 'statementTimeoutMillis in its place, which is set inside the transaction',
  lock_timeout: "settings: () => ({ lock_timeout: '…' }) in its place, which is set inside the transaction",
  idle_in_transaction_session_timeout:
    "settings: () => ({ idle_in_transaction_session_timeout: '…' }) in its place, or ALTER ROLE … SET",
  options: 'settings in its place, or ALTER ROLE … SET',
  replication: 'a connection that PgBouncer is not in the way of',
}

/** The options in question. */
interface Options {
  readonly preparedStatements?: object | false | undefined
  readonly resetOnReturn?: string | undefined
  readonly pool?: { readonly prePing?: object | false | undefined } | undefined
}

/**
 * Refuses what cannot work where consecutive transactions run on different server connections.
 * @throws INVALID_OPTION
 */
export function checkPooler(options: Options, connection: pg.ClientConfig): void {
  if (options.preparedStatements) {
    const got = 'named statements, which the next transaction may not find'
    throw new InvalidOption('preparedStatements', "false with pooler 'transaction'", got)
  }
  if (options.resetOnReturn === 'discard') {
    const expected =
      "'rollback' with pooler 'transaction', and server_reset_query_always in PgBouncer where it is needed"
    throw new InvalidOption('resetOnReturn', expected, "'discard', which would clean another session's connection")
  }
  if (options.pool?.prePing) {
    const got = 'a ping, which waits for a server connection like everybody else'
    throw new InvalidOption('pool.prePing', "false with pooler 'transaction', or nothing", got)
  }
  checkStartup(connection)
}

function checkStartup(connection: pg.ClientConfig): void {
  const parameters = startupParameters(connection)
  for (const [name, cure] of Object.entries(STARTUP)) {
    const value = parameters[name]
    if (!value) continue
    const given = (connection as Record<string, unknown>)[name]
    const where = connection.connectionString?.includes(name) ? 'in the connection string' : 'in the environment'
    const got = typeof given === 'number' ? String(given) : `a value${given ? '' : ` ${where}`}`
    throw new InvalidOption(`connection.${name}`, `${cure}: PgBouncer refuses it at start-up`, got)
  }
}

// Of the option, the connection string and the environment, as pg itself puts them together.
function startupParameters(connection: pg.ClientConfig): Record<string, unknown> {
  try {
    // The app's own `stream` may open a connection.
    const { stream: _, ...config } = connection
    const client = new pg.Client(config) as unknown as { connectionParameters: Record<string, unknown> }
    return client.connectionParameters
  } catch {
    // A certificate that cannot be read, for example: whoever connects is told so.
    return {}
  }
}
