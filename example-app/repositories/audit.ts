import { currentSession } from 'fastify-request-db'

/**
 * Keeps a note of what was done, with the fate of the request that did it. It is called from deep inside, by code that
 * has no session at hand, and finds the one of the running request; the other repositories are handed theirs.
 */
export async function noteInAudit(what: string): Promise<void> {
  const session = currentSession()
  session.add(session.insertInto('audit').values({ what }))
}
