const notWhole = [Number.NaN, Number.POSITIVE_INFINITY, 0.5, '5', true, [], {}, null, 5n]
const notMillis = [...notWhole, -1, -5, 2 ** 31]
const notText = [0, true, [], {}, null, () => '']
export const notBoolean = ['true', 0, 1, null, {}]
const notFunction = ['f', 1, true, null, {}]

/** Every option of the plugin, and what it must not take. Dots lead into objects. */
export const WRONG: Record<string, readonly unknown[]> = {
  connectionString: [...notText, ''],
  connection: ['', 1, true, null, []],
  pool: ['', 1, true, false, null, []],
  'pool.size': [...notWhole, 0, -1],
  'pool.maxOverflow': [...notWhole, -1, -2],
  'pool.timeoutMillis': notMillis,
  'pool.maxWaiting': [...notWhole, -1],
  'pool.recycleMillis': [...notMillis, 0],
  'pool.prePing': [true, 1, '', null, []],
  'pool.prePing.idleMillis': notMillis,
  'pool.prePing.timeoutMillis': [...notMillis, 0],
  decorator: [...notText, '', 'a b', 'a-b', '1a', 'a.b'],
  commitOn: [...notText, 'onsend', 'onError', ''],
  shouldCommit: notFunction,
  isolationLevel: [...notText, 'foo', 'READ COMMITTED', 'serializable; drop table trips', 'snapshot'],
  readOnly: ['true', 0, 1, null, {}],
  deferrable: notBoolean,
  settings: notFunction,
  statementTimeoutMillis: [...notMillis, 0].filter((value) => value !== false),
  settleTimeoutMillis: [...notMillis, 0],
  maxSessionMillis: [...notMillis, 0],
  closeGraceMillis: notMillis,
  resetOnReturn: [...notText, '', 'ROLLBACK', 'commit', 'none'],
  preparedStatements: [true, 1, '', null, []],
  'preparedStatements.cacheSize': [...notWhole, 0, -1],
  pooler: [...notText, '', 'session', 'statement', 'pgbouncer'],
  plugins: ['', 1, true, null, {}],
}
