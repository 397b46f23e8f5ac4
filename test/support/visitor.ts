import type { RequestDbError } from '../../lib/errors.ts'
import type { Borrower, Loan } from '../../lib/pool/loan.ts'
import { deafLog } from './ledger.ts'

/** A borrower that only writes down what it is told. */
export class Visitor implements Borrower {
  readonly who
  readonly log = deafLog
  readonly origin = undefined
  readonly told: unknown[] = []
  isEnding = false
  canFollow = false
  loan: Loan | undefined
  error: RequestDbError | undefined
  onGranted = (_loan: Loan) => {}

  constructor(name: string) {
    this.who = { method: 'GET', route: name, requestId: name }
  }
  granted(loan: Loan): void {
    this.loan = loan
    this.told.push('granted')
    this.onGranted(loan)
  }
  refused(error: RequestDbError): void {
    this.error = error
    this.told.push(error.code.replace('FST_REQUEST_DB_', ''))
  }
  caughtUp(): void {}
  overdue(reason: () => RequestDbError): void {
    this.error = reason()
    this.told.push('overdue')
  }
  lost(death: Error, _again?: () => unknown): void {
    this.told.push(['lost', death.message])
  }
  evict(reason: { code: string }): void {
    this.told.push(['evicted', reason.code.replace('FST_REQUEST_DB_', '')])
  }
}
