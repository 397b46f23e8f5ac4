import { fileURLToPath } from 'node:url'

/** What can be set from outside. */
export interface Environment {
  /** PORT. 0 takes one that is free. */
  readonly port: number
  /** WORKERS, of `npm run start:cluster`. */
  readonly workers: number
  /** DATA_FOLDER, where the embedded PostgreSQL keeps its data. */
  readonly dataFolder: string
  /** DATABASE_URL. Undefined: the embedded PostgreSQL. */
  readonly databaseUrl: string | undefined
}

/** @throws with one sentence for the terminal. */
export function readEnvironment({ PORT, WORKERS, DATA_FOLDER, DATABASE_URL }: NodeJS.ProcessEnv): Environment {
  return {
    port: readPort(PORT || '3000'),
    workers: readWorkers(WORKERS || '2'),
    dataFolder: DATA_FOLDER || fileURLToPath(new URL('data', import.meta.url)),
    databaseUrl: DATABASE_URL ? readDatabaseUrl(DATABASE_URL) : undefined,
  }
}

function readPort(text: string): number {
  const port = Number(text)
  if (!/^\d+$/.test(text) || port > 65_535) throw new Error(`PORT is ${text}, but has to be a number from 0 to 65535`)
  return port
}

function readWorkers(text: string): number {
  if (!/^[1-9]\d?$/.test(text)) throw new Error(`WORKERS is ${text}, but has to be a number from 1 to 99`)
  return Number(text)
}

function readDatabaseUrl(text: string): string {
  const protocol = URL.canParse(text) ? new URL(text).protocol : undefined
  // The text itself is not repeated: there may be a password in it.
  if (protocol !== 'postgres:' && protocol !== 'postgresql:')
    throw new Error('DATABASE_URL has to look like postgres://user:password@host:5432/database')
  return text
}
