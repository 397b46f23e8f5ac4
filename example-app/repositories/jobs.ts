import type { Session } from 'fastify-request-db'
import { sql } from 'kysely'
import type { Mail } from '../mailer.ts'

const MOST_ATTEMPTS = 5

/** Keeps a mail to be sent, in the transaction of what it tells: neither of them is there without the other. */
export function enqueueMail(session: Session, mail: Mail): void {
  session.add(session.insertInto('jobs').values({ mail: JSON.stringify(mail) }))
}

/** Takes the job that is due longest and that no other worker has. It is gone with the commit, and back after a rollback. */
export function takeJob(session: Session) {
  return session
    .deleteFrom('jobs')
    .where('id', '=', (eb) =>
      eb
        .selectFrom('jobs')
        .select('id')
        .where('due_at', '<=', sql<Date>`now()`)
        .orderBy('due_at')
        .limit(1)
        .forUpdate()
        .skipLocked(),
    )
    .returningAll()
    .executeTakeFirst()
}

/** Puts a job that has failed off, each time for longer. After the last attempt it stays, due never, for somebody to look at. */
export async function postpone(session: Session, id: number): Promise<void> {
  await session
    .updateTable('jobs')
    .set((eb) => ({
      attempts: eb('attempts', '+', 1),
      due_at: sql`case when attempts + 1 < ${MOST_ATTEMPTS} then now() + interval '1 second' * 2 ^ attempts
        else 'infinity' end`,
    }))
    .where('id', '=', id)
    .execute()
}
