import pg from 'pg'
import { ConnectionLost } from '../../lib/errors.ts'
import { type Flight, Step } from '../../lib/pool/flight.ts'
import { endsTransaction, tellLanded, tellLost } from '../../lib/session/outcome.ts'
import { t } from '../support/test.ts'

const fatal = Object.assign(new pg.DatabaseError('terminating', 11, 'error'), { code: '57P01', severity: 'FATAL' })
const reset = new Error('ECONNRESET')

interface Outcome {
  readonly told: unknown[]
  readonly flight: Flight
}

/** A flight of `texts` as the server left it: `at` steps answered, then perhaps an error. */
function flightOf(texts: string[], at: number, error?: Error, prefix = 0): Outcome {
  const told: unknown[] = []
  const steps = texts.map((text, index) => {
    const step = new Step({ text, prefix: index < prefix }, (outcome) => told.push(outcome))
    step.completed = index < at
    return step
  })
  return { told, flight: { steps, at, error } as unknown as Flight }
}
const codes = (told: unknown[]) => told.map((error) => (error as { code?: string } | undefined)?.code)

t.test('a flight that landed: everybody has its answer', async (t) => {
  const { told, flight } = flightOf(['a', 'b'], 2)
  tellLanded(flight, 'db')
  t.strictSame(told, [undefined, undefined])
})

t.test("a row that could not be parsed is its own statement's matter", async (t) => {
  const { told, flight } = flightOf(['a', 'b'], 2)
  const unreadable = new Error('unreadable')
  flight.steps[0]!.rowError = unreadable
  tellLanded(flight, 'db')
  t.strictSame(told, [unreadable, undefined])
})

t.test(
  'of a flight that was refused in the middle the first have answers, one the error, the rest was skipped',
  async (t) => {
    const error = new Error('refused')
    const { told, flight } = flightOf(['a', 'b', 'c'], 1, error)
    tellLanded(flight, 'db')
    t.equal(told[0], undefined)
    t.equal(told[1], error)
    t.match(told[2], { code: 'FST_REQUEST_DB_TRANSACTION_ABORTED', cause: error })
  },
)

t.test('where the prefix was refused everybody gets its error', async (t) => {
  const error = new Error('no such parameter')
  const { told, flight } = flightOf(['BEGIN', 'select set_config', 'a', 'b'], 1, error, 2)
  tellLanded(flight, 'db')
  t.strictSame(told, [undefined, error, error, error])
})

t.test(
  "an error behind the last answer is the last one's: a transaction of its own that failed at its end",
  async (t) => {
    const error = new Error('deferred constraint')
    const { told, flight } = flightOf(['a'], 1, error)
    tellLanded(flight, 'db')
    t.strictSame(told, [error])
  },
)

const lost = (death: Error) => () => new ConnectionLost('db', { cause: death })

t.test('a flight that was lost without a COMMIT is undone', async (t) => {
  const { told, flight } = flightOf(['a', 'b'], 1)
  tellLost(flight, reset, true, lost(reset), 'db', () => false)
  t.strictSame(codes(told), Array(2).fill('FST_REQUEST_DB_CONNECTION_LOST'))
  t.match(told[0], { cause: reset })
})

for (const [what, death, at, reached, code] of [
  ['a reset before its answer', reset, 1, true, 'FST_REQUEST_DB_COMMIT_UNKNOWN'],
  ['a goodbye of the server before its turn', fatal, 0, true, 'FST_REQUEST_DB_CONNECTION_LOST'],
  ['a goodbye of the server at its turn', fatal, 1, true, 'FST_REQUEST_DB_COMMIT_UNKNOWN'],
  ['a flight that never arrived', reset, 0, false, 'FST_REQUEST_DB_CONNECTION_LOST'],
  ['an answer that had come', reset, 2, true, undefined],
] as const) {
  t.test(`what becomes of COMMIT: ${what}`, async (t) => {
    const { told, flight } = flightOf(['a', 'COMMIT'], at)
    tellLost(flight, death, reached, lost(death), 'db', ({ spec }) => spec.text === 'COMMIT')
    t.equal(codes(told)[1], code)
  })
}

for (const [what, death, at, code] of [
  ['a reset', reset, 0, 'FST_REQUEST_DB_COMMIT_UNKNOWN'],
  ['a goodbye before its answer', fatal, 0, 'FST_REQUEST_DB_CONNECTION_LOST'],
  ['a goodbye behind its answer', fatal, 1, 'FST_REQUEST_DB_COMMIT_UNKNOWN'],
] as const) {
  t.test(`what becomes of a statement without a transaction: ${what}`, async (t) => {
    const { told, flight } = flightOf(['a'], at)
    tellLost(flight, death, true, lost(death), 'db', () => true)
    t.equal(codes(told)[0], code)
  })
}

t.test('which statements of the app end a transaction', async (t) => {
  const ends = (text: string, command: string | null, describe = true) => {
    const step = new Step({ text, describe }, () => {})
    if (command !== null) step.result = { command } as Step['result']
    return endsTransaction(step)
  }
  t.equal(ends('commit', 'COMMIT'), true)
  t.equal(ends('commit and chain', 'COMMIT'), true)
  t.equal(ends('rollback', 'ROLLBACK'), true)
  t.equal(ends('rollback and chain', 'ROLLBACK'), true)
  t.equal(ends('rollback to savepoint x', 'ROLLBACK'), false)
  t.equal(ends('select 1', 'SELECT'), false)
  t.equal(ends('commit', null), false)
  t.equal(ends('COMMIT', 'COMMIT', false), false, 'ours')
})
