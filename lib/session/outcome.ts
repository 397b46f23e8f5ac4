import { CommitUnknown, type RequestDbError, sqlStateOf, TransactionAborted } from '../errors.ts'
import type { Flight, Step } from '../pool/flight.ts'

/** Whether a statement of the app has ended our transaction. After `COMMIT AND CHAIN` the server's status does not tell. */
export function endsTransaction({ spec, result }: Step): boolean {
  if (!spec.describe || !result) return false
  const isSavepoint = /\bto\b/i.test(spec.text ?? '')
  return result.command === 'COMMIT' || (result.command === 'ROLLBACK' && !isSavepoint)
}

/** Tells the steps of a flight what the server answered: results, one refusal, and nothing for the rest. */
export function tellLanded({ steps, error, at }: Flight, pool: string): void {
  if (error === undefined) {
    for (const step of steps) step.settle(step.rowError)
    return
  }
  // Where a flight is a transaction of its own, what fails at its end comes after the last step.
  const refused = Math.min(at, steps.length - 1)
  // Where the prefix failed, the statements behind it deserve its error, not the news that they were skipped.
  const why = 'a statement sent together with this one failed'
  const skipped = steps[refused]?.spec.prefix ? error : new TransactionAborted(pool, why, { cause: error })
  for (const [index, step] of steps.entries()) {
    step.settle(index < refused ? step.rowError : index === refused ? error : skipped)
  }
}

/**
 * Tells the steps of a flight that the connection died. `reached` is false where the server surely did nothing of it;
 * `lostWith` makes the news
 * of it, and `isDecisive` picks the steps by which something may have been kept.
 */
export function tellLost(
  { steps, at }: Flight,
  death: Error,
  reached: boolean,
  lostWith: () => RequestDbError,
  pool: string,
  isDecisive: (step: Step) => boolean,
): void {
  let error: RequestDbError | undefined
  const lost = () => {
    error ??= lostWith()
    return error
  }
  const unknown = new CommitUnknown(pool, { cause: death })
  for (const [index, step] of steps.entries()) {
    if (!reached || !isDecisive(step)) step.settle(lost())
    else if (step.spec.text === 'COMMIT') {
      // The server answers in order: a goodbye before COMMIT's turn means that it was never run.
      const never = sqlStateOf(death) !== undefined && at < index
      step.settle(step.completed ? undefined : never ? lost() : unknown)
    } else {
      // A transaction of its own ends behind its last answer; a goodbye before that answer has undone it.
      step.settle(sqlStateOf(death) !== undefined && !step.completed ? lost() : unknown)
    }
  }
}
