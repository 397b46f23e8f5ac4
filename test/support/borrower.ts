import type { FastifyInstance } from 'fastify'
import type { Session, SessionOptions, Snapshot } from '../../lib/index.ts'
import { eventually } from './eventually.ts'
import { gate } from './gate.ts'
import { pidOf } from './notebook.ts'
import type { Test } from './test.ts'

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

/** Ends them all, well; resolves with their backends. */
export const endAll = (borrowers: readonly Borrower[]) =>
  Promise.all(borrowers.map((one) => one.end().then(() => one.got)))

/** Connections open, idle, checked out and beyond the size, and how many wait. */
export const counts = ({ open, idle, checkedOut, overflow, waiting }: Snapshot) => [
  open,
  idle,
  checkedOut,
  overflow,
  waiting,
]

/** Resolves when `counts` are these. */
export async function comesTo(app: FastifyInstance, expected: number[]): Promise<void> {
  await eventually(() => String(counts(app.db.snapshot())) === String(expected), {
    describe: () => `open, idle, checkedOut, overflow, waiting: ${counts(app.db.snapshot())}, not ${expected}`,
  })
}

/** Asserts what every pool must come to when nobody wants it any more. */
export async function isSound(t: Test, app: FastifyInstance): Promise<void> {
  await eventually(() => app.db.snapshot().open === app.db.snapshot().idle)
  const { totals, open, waiting, size, checkedOut } = app.db.snapshot()
  t.ok(open <= size, `${open} of ${size} are open`)
  t.strictSame([checkedOut, waiting], [0, 0])
  t.equal(open, totals.opened - totals.closed - totals.recycled - totals.invalidated, 'all that were opened are known')
}
