import { execFile } from 'node:child_process'
import { stat } from 'node:fs/promises'
import { promisify } from 'node:util'

const run = promisify(execFile)

/** The user a process runs as, in the words of `spawn`. */
export interface Account {
  uid: number
  gid: number
}

/**
 * PostgreSQL refuses to run as root. Root starts it as the owner of the data that is there, else as the user
 * `postgres`, who is made where missing. Undefined for everybody else, who start it as themselves.
 */
export async function serverAccount(cluster: string): Promise<Account | undefined> {
  if (process.getuid?.() !== 0) return undefined
  const owner = await stat(cluster).catch(() => undefined)
  if (owner && owner.uid !== 0) return { uid: owner.uid, gid: owner.gid }
  return (await postgresUser()) ?? (await makePostgresUser())
}

async function postgresUser(): Promise<Account | undefined> {
  try {
    const [uid, gid] = await Promise.all([run('id', ['-u', 'postgres']), run('id', ['-g', 'postgres'])])
    return { uid: Number(uid.stdout), gid: Number(gid.stdout) }
  } catch {
    return undefined // id says: no such user.
  }
}

async function makePostgresUser(): Promise<Account> {
  try {
    await run('groupadd', ['--force', 'postgres'])
    await run('useradd', ['--system', '--no-create-home', '--gid', 'postgres', 'postgres'])
  } catch (error) {
    throw new Error(
      'PostgreSQL does not run as root, and the user postgres could not be made: start as another user, or set DATABASE_URL',
      { cause: error },
    )
  }
  const account = await postgresUser()
  if (!account) throw new Error('The user postgres was made, yet id does not find it: start as another user')
  return account
}
