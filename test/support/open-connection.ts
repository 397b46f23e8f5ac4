import type { Test } from 'tap'
import { Connection } from '../../lib/pool/connection.ts'
import { type Flight, Step, type TransactionStatus } from '../../lib/pool/flight.ts'
import { UNNAMED } from '../../lib/pool/statements.ts'

/** What became of a flight. */
export interface Landing {
  readonly flight: Flight
  readonly status?: TransactionStatus
  readonly death?: Error
  readonly reached?: boolean
}

/** One connection of the library's own kind, without a pool around it; destroyed at the end of `t`. */
export async function openConnection(
  t: Test,
  config: object,
  expiresAt = Number.POSITIVE_INFINITY,
): Promise<Connection> {
  const connection = await new Promise<Connection>((resolve, reject) => {
    Connection.open(config, UNNAMED, expiresAt, (error, opened) => (opened ? resolve(opened) : reject(error)))
  })
  t.teardown(() => connection.destroy())
  return connection
}

/** Steps that only carry their SQL and want rows. */
export const asking = (...texts: string[]): Step[] => texts.map((text) => new Step({ text, describe: true }, () => {}))

/** Sends steps as one flight; resolves when it has landed, or is lost. */
export function fly(connection: Connection, steps: readonly Step[]): Promise<Landing> {
  return new Promise((resolve) => {
    connection.send(steps, {
      flightLanded: (flight, status) => resolve({ flight, status }),
      flightLost: (flight, death, reached) => resolve({ flight, death, reached }),
    })
  })
}

/** Sends steps and looks at the rows of the last one. */
export async function rowsOf(connection: Connection, text: string): Promise<unknown[]> {
  const steps = asking(text)
  await fly(connection, steps)
  return steps[0]!.result!.rows
}
