import { fullOf, isServerFull, reasonOf } from '../../lib/observe/unreachable.ts'
import { test } from '../support/test.ts'

/* What the errors of sockets, of PostgreSQL and of pg mean. */

const coded = (code: string, message = 'no') => Object.assign(new Error(message), { code })

test('errors with a code are told by it, whatever their text', async (t) => {
  const kinds: [string, string][] = [
    ['ECONNREFUSED', 'refused'],
    ['ENOENT', 'refused'],
    ['ENOTFOUND', 'dns'],
    ['EAI_AGAIN', 'dns'],
    ['ETIMEDOUT', 'silent'],
    ['EHOSTUNREACH', 'silent'],
    ['57P03', 'starting'],
    ['28P01', 'credentials'],
    ['28000', 'credentials'],
    ['3D000', 'database'],
    ['DEPTH_ZERO_SELF_SIGNED_CERT', 'tls'],
    ['UNABLE_TO_VERIFY_LEAF_SIGNATURE', 'tls'],
    ['ECONNRESET', 'lost'],
    ['57P01', 'lost'],
    ['57P05', 'lost'],
    ['40001', 'lost'],
    ['25P03', 'idle-timeout'],
    ['08006', 'lost'],
    ['XX000', 'other'],
  ]
  for (const [code, kind] of kinds) {
    const reason = reasonOf(coded(code, 'timeout, password, SSL'))
    if (kind !== 'other') t.equal(reason.kind, kind, code)
    t.match(reason.sentence, new RegExp(`^PostgreSQL cannot be reached: .*\\(${code}\\)$`))
  }
  t.equal(reasonOf(coded('XX000', 'out of paper')).kind, 'other')
})

test('those of pg and of ours, which bear none, are told by their text', async (t) => {
  const kinds: [string, string][] = [
    ['timeout expired', 'silent'],
    ['No answer within 500 ms', 'silent'],
    ['SASL: SCRAM-SERVER-FIRST-MESSAGE: client password must be a string', 'credentials'],
    ['The server does not support SSL connections', 'tls'],
    ['Connection terminated unexpectedly', 'lost'],
    ['something new', 'other'],
  ]
  for (const [text, kind] of kinds) t.equal(reasonOf(new Error(text)).kind, kind, text)
  t.match(reasonOf(new Error('something new')).sentence, /the attempt failed: something new$/)
})

test('what is said of a connection that was open is not that the server cannot be reached', async (t) => {
  t.match(reasonOf(coded('57P01'), true).sentence, /^A connection to PostgreSQL was lost: the connection was cut: /)
  t.match(reasonOf(coded('ECONNRESET')).sentence, /cannot be reached: whatever listens at its address hangs up at once/)
  t.match(reasonOf(coded('25P03'), true).sentence, /idle_in_transaction_session_timeout: do slow work before/)
})

test('whose limit on connections is reached is told in any language', async (t) => {
  const full = (routine: string) => fullOf(Object.assign(coded('53300', 'zu viele'), { routine }))
  t.equal(full('InitializeSessionUserId'), 'role')
  t.equal(full('CheckMyDatabase'), 'database')
  t.equal(full('InitProcess'), 'server')
})

test('only 53300 says that the server is full', async (t) => {
  t.equal(isServerFull(coded('53300')), true)
  t.equal(isServerFull(coded('53200')), false)
  t.equal(isServerFull(new Error('too many clients')), false)
})
