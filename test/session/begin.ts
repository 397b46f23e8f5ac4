import { beginStatement, isCommitCertain, routeSettings, settingsStep } from '../../lib/session/begin.ts'
import { t } from '../support/test.ts'

t.test('the BEGIN statement says what differs from the defaults, and no more', async (t) => {
  t.equal(beginStatement({}), 'BEGIN')
  t.equal(beginStatement({ isolationLevel: undefined, readOnly: false, deferrable: false }), 'BEGIN')
  t.equal(beginStatement({ isolationLevel: 'repeatable read' }), 'BEGIN ISOLATION LEVEL REPEATABLE READ')
  t.equal(beginStatement({ readOnly: true }), 'BEGIN READ ONLY')
  t.equal(
    beginStatement({ isolationLevel: 'serializable', readOnly: true, deferrable: true }),
    'BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY DEFERRABLE',
  )
})

t.test('a COMMIT is certain where nothing was written and no other transaction can be in the way', async (t) => {
  t.equal(isCommitCertain({}), false)
  t.equal(isCommitCertain({ isolationLevel: 'repeatable read' }), false)
  t.equal(isCommitCertain({ readOnly: true }), true)
  t.equal(isCommitCertain({ readOnly: true, isolationLevel: 'repeatable read' }), true)
  t.equal(isCommitCertain({ readOnly: true, isolationLevel: 'serializable' }), false)
  t.equal(isCommitCertain({ readOnly: true, isolationLevel: 'serializable', deferrable: true }), true)
})

t.test('settings are one statement whose names and values are parameters', async (t) => {
  const step = settingsStep({ 'app.tenant': "o'brien", 'app.n': 1, 'app.b': false })
  t.match(step?.spec, {
    text: 'SELECT set_config($1, $2, true), set_config($3, $4, true), set_config($5, $6, true)',
    values: ['app.tenant', "o'brien", 'app.n', '1', 'app.b', 'false'],
    prefix: true,
  })
  t.equal(step?.settle(undefined), undefined)
  t.equal(settingsStep({}), undefined)
})

t.test('a setting without a value stops everything', async (t) => {
  for (const value of [undefined, null, {}, [], Symbol('x')]) {
    t.throws(() => settingsStep({ 'app.tenant': value as unknown as string }), {
      code: 'FST_REQUEST_DB_INVALID_OPTION',
      message: /settings\['app\.tenant'\]/,
    })
  }
})

t.test('options of a route become settings where BEGIN cannot say them', async (t) => {
  const route = {
    commitOn: 'onSend',
    shouldCommit: undefined,
    isolationLevel: undefined,
    readOnly: false,
    deferrable: false,
    autocommit: false,
    statementTimeoutMillis: false,
    retry: undefined,
  } as const
  t.equal(routeSettings(route, true), undefined)
  t.strictSame(routeSettings({ ...route, statementTimeoutMillis: 100 }, false), { statement_timeout: 100 })
  t.strictSame(routeSettings({ ...route, autocommit: true }, true), { transaction_read_only: 'on' })
})
