import type { FastifyInstance } from 'fastify'
import type { Session, SessionOptions } from '../../lib/index.ts'
import { gate } from './gate.ts'
import { pidOf } from './notebook.ts'

/** Somebody outside of a request who asks for a connection, and keeps it until told otherwise. */
export interface Borrower {
  /** The backend of the connection it has got; rejects with why it has got none. */
  readonly got: Promise<number>
  /** Its session; use it after `got`. */
  readonly db: () => Session
  /** Has the session end well; resolves when it has ended, rejects with what that failed with. */
  end(): Promise<void>
}

/** Asks now. A `Session` of its own, whose first statement asks for its backend. */
export function borrow(app: FastifyInstance, options: SessionOptions = {}): Borrower {
  const done = gate()
  const first = gate<number>()
  let session: Session | undefined
  const ended = app.db.session(options, async (db) => {
    session = db
    first.open(await pidOf(db))
    await done.opened
  })
  const got = Promise.race([first.opened, ended.then(() => first.opened)])
  got.catch(() => {})
  ended.catch(() => {})
  return {
    got,
    db: () => session as Session,
    end: () => {
      done.open()
      return ended
    },
  }
}

/** As many at once; resolves when all have their connections. */
export async function borrowMany(app: FastifyInstance, count: number): Promise<Borrower[]> {
  const borrowers = Array.from({ length: count }, () => borrow(app))
  await Promise.all(borrowers.map(({ got }) => got))
  return borrowers
}
