import Fastify from 'fastify'
import { CamelCasePlugin } from 'kysely'
import { checkOptions, checkRouteOptions, checkSessionOptions } from '../lib/check-options.ts'
import requestDb, { type RequestDbOptions } from '../lib/index.ts'
import type { EffectiveRouteOptions, SessionOptions } from '../lib/options.ts'
import { t } from './support/test.ts'
import { notBoolean, WRONG } from './support/wrong-options.ts'

const connectionString = 'postgres://somebody:secret@db.example/trips'
const check = (options: object) => checkOptions(options as RequestDbOptions)
const DEFAULTS: EffectiveRouteOptions = check({ connectionString }).route
const ROUTE = 'config.db of GET /trips'

/** `{ pool: { size: value } }` for 'pool.size'. */
function at(path: string, value: unknown): object {
  return path.split('.').reduceRight<unknown>((inner, name) => ({ [name]: inner }), value) as object
}
const withConnection = (path: string, value: unknown) =>
  path.startsWith('connection') ? at(path, value) : { connectionString, ...at(path, value) }

for (const [path, values] of Object.entries(WRONG)) {
  t.test(`${path} refuses what it cannot be, and says its name, what it takes and what it got`, async (t) => {
    for (const value of values) {
      const name = path.replaceAll('.', '\\.')
      t.throws(() => check(withConnection(path, value)), {
        code: 'FST_REQUEST_DB_INVALID_OPTION',
        retryable: false,
        message: new RegExp(`^Option ${name}: expected [^,]+.*, got .+`),
      })
    }
  })
}

t.test('the texts are to be read', async (t) => {
  const text = (options: object) => {
    try {
      check(options)
      return 'accepted'
    } catch (error) {
      return (error as Error).message
    }
  }
  t.equal(
    text({ connectionString, pool: { size: -1 } }),
    'Option pool.size: expected a whole number of at least 1, got -1',
  )
  t.equal(
    text({ connectionString, pool: { size: '5' } }),
    "Option pool.size: expected a whole number of at least 1, got '5'",
  )
  t.equal(
    text({ connectionString, commitOn: 'onError' }),
    "Option commitOn: expected one of 'onSend', 'onResponse', got 'onError'",
  )
  t.equal(
    text({ connectionString, settleTimeoutMillis: null }),
    'Option settleTimeoutMillis: expected a whole number of milliseconds from 1 to 2147483647, got null',
  )
  t.match(
    text({ connectionString, poolsize: 5 }),
    /^Option poolsize: expected one of .*\bpool\b.*, got an unknown name$/,
  )
})

t.test('names that do not exist are refused, wherever they are', async (t) => {
  for (const [options, path] of [
    [{ connectionString, sizes: 1 }, 'sizes'],
    [{ connectionString, pool: { max: 1 } }, 'pool.max'],
    [{ connectionString, pool: { prePing: { idle: 1 } } }, 'pool.prePing.idle'],
    [{ connectionString, preparedStatements: { size: 1 } }, 'preparedStatements.size'],
    [{ connectionString, toString: 1 }, 'toString'],
    [{ connectionString, constructor: 1 }, 'constructor'],
    [{ connectionString, ...JSON.parse('{"hasOwnProperty": 1}') }, 'hasOwnProperty'],
    [JSON.parse(`{"connectionString": "${connectionString}", "__proto__": {}}`), '__proto__'],
    [{ connectionString, autocommit: true }, 'autocommit'],
    [{ connectionString, undefined: undefined }, 'undefined'],
    [{ connectionString, retry: { attempts: 3 } }, 'retry'],
  ] as const) {
    t.throws(() => check(options), {
      code: 'FST_REQUEST_DB_INVALID_OPTION',
      message: new RegExp(`^Option ${path}: expected one of .*, got an unknown name$`),
    })
  }
})

t.test('what the options must be together', async (t) => {
  for (const options of [{}, { pool: {} }, { connectionString: undefined }, { connection: undefined }]) {
    t.throws(() => check(options), { code: 'FST_REQUEST_DB_INVALID_OPTION', message: /^Option connection(String)?: / })
  }
  t.throws(() => check({ connectionString, connection: {} }), { message: /^Option connectionString: .*, got both$/ })
  t.throws(() => check({ connection: { query_timeout: 1000 } }), { message: /^Option connection\.query_timeout: / })
  for (const options of [undefined, null, 5, [], () => {}]) {
    t.throws(() => check(options as unknown as object), { code: 'FST_REQUEST_DB_INVALID_OPTION' })
  }
})

t.test('what may hold a secret is never repeated', async (t) => {
  for (const options of [
    { connectionString: [connectionString] },
    { connectionString: new URL(connectionString) },
    { connectionString: { password: 'secret' } },
    { connection: connectionString },
    { connection: [{ password: 'secret' }] },
    { connectionString, connection: { password: 'secret' } },
    { connection: { password: 'secret', query_timeout: 5 } },
    { connectionString, pool: { size: { password: 'secret' } } },
    { connectionString, pool: { size: ['secret'] } },
  ]) {
    const error = t.throws(() => check(options), { code: 'FST_REQUEST_DB_INVALID_OPTION' }) as Error
    t.notMatch(`${error.stack}${JSON.stringify(error)}`, /secret/)
  }
})

t.test('a connection string in the wrong place is not repeated', async (t) => {
  for (const options of [
    connectionString as unknown as object,
    { pool: connectionString },
    { connectionString, decorator: connectionString },
    { connectionString, commitOn: connectionString },
    { connectionString, pool: { size: connectionString } },
    { connectionString, [connectionString]: true },
    { connectionString, commitOn: 'host=db.example password=secret' },
  ]) {
    const error = t.throws(() => check(options), { code: 'FST_REQUEST_DB_INVALID_OPTION' }) as Error
    t.notMatch(`${error.stack}${JSON.stringify(error)}`, /secret/)
  }
})

t.test('the defaults', async (t) => {
  t.strictSame(check({ connectionString }), {
    pool: {
      name: 'db',
      connection: { keepAlive: true, fallback_application_name: 'fastify-request-db', connectionString },
      size: 10,
      maxOverflow: 0,
      timeoutMillis: 10_000,
      maxWaiting: 1000,
      recycleMillis: 1_800_000,
      prePing: { idleMillis: 1000, timeoutMillis: 500 },
      settleTimeoutMillis: 2000,
      closeGraceMillis: 5000,
      resetOnReturn: 'rollback',
      preparedStatements: false,
      pooler: false,
      leakDetectionMillis: false,
      processes: undefined,
      capacityCheck: true,
    },
    route: {
      commitOn: 'onSend',
      shouldCommit: undefined,
      isolationLevel: undefined,
      readOnly: false,
      deferrable: false,
      autocommit: false,
      statementTimeoutMillis: false,
      retry: undefined,
    },
    settings: undefined,
    maxSessionMillis: false,
    plugins: [],
    echo: false,
    echoPool: false,
    echoParameters: false,
    serverTiming: false,
    asyncContext: false,
  })
})

t.test('what is given is what is in force, at its limits too', async (t) => {
  const shouldCommit = () => true
  const settings = () => ({})
  const plugin = new CamelCasePlugin()
  const options = check({
    connection: { host: 'db.example', keepAlive: false },
    pool: {
      size: 1,
      maxOverflow: 0,
      timeoutMillis: 0,
      maxWaiting: 0,
      recycleMillis: 1,
      prePing: { idleMillis: 0, timeoutMillis: 1 },
    },
    decorator: '$pg_2',
    commitOn: 'onResponse',
    shouldCommit,
    isolationLevel: 'repeatable read',
    readOnly: true,
    deferrable: true,
    settings,
    statementTimeoutMillis: 1,
    settleTimeoutMillis: 2 ** 31 - 1,
    maxSessionMillis: 2 ** 31 - 1,
    closeGraceMillis: 0,
    resetOnReturn: 'discard',
    preparedStatements: { cacheSize: 1 },
    plugins: [plugin],
  })
  t.match(options, {
    pool: {
      name: '$pg_2',
      connection: { host: 'db.example', keepAlive: false },
      size: 1,
      timeoutMillis: 0,
      maxWaiting: 0,
      recycleMillis: 1,
      prePing: { idleMillis: 0, timeoutMillis: 1 },
      settleTimeoutMillis: 2 ** 31 - 1,
      closeGraceMillis: 0,
      resetOnReturn: 'discard',
      preparedStatements: { cacheSize: 1 },
    },
    route: { commitOn: 'onResponse', isolationLevel: 'repeatable read', readOnly: true, statementTimeoutMillis: 1 },
    maxSessionMillis: 2 ** 31 - 1,
  })
  t.equal(options.route.shouldCommit, shouldCommit)
  t.equal(options.settings, settings)
  t.strictSame(options.plugins, [plugin])
})

t.test('false turns off what can be turned off', async (t) => {
  const off = check({
    connectionString,
    pool: { recycleMillis: false, prePing: false },
    statementTimeoutMillis: false,
    maxSessionMillis: false,
    preparedStatements: false,
  })
  const pool = { recycleMillis: Number.POSITIVE_INFINITY, prePing: false, preparedStatements: false }
  t.match(off, { pool, maxSessionMillis: false })
  t.match(check({ connectionString, preparedStatements: {} }).pool, { preparedStatements: { cacheSize: 100 } })
  t.equal(off.route.statementTimeoutMillis, false)
})

t.test('undefined leaves an option out, but for the connection', async (t) => {
  const nothing = Object.fromEntries(
    Object.keys(WRONG)
      .filter((path) => !path.includes('.') && !path.startsWith('connection'))
      .map((name) => [name, undefined]),
  )
  const emptyPool = { size: undefined, maxOverflow: undefined, prePing: { idleMillis: undefined } }
  t.strictSame(check({ connectionString, ...nothing, pool: emptyPool }), check({ connectionString }))
  t.throws(() => check({ connectionString: process.env.NO_SUCH_VARIABLE }), { message: /^Option connectionString: / })
})

t.test('the result is frozen, and the caller’s objects are neither changed nor held on to', async (t) => {
  const given = {
    connection: { host: 'one' },
    pool: { size: 2, prePing: { idleMillis: 5 } },
    plugins: [new CamelCasePlugin()],
  }
  const before = structuredClone({ ...given, plugins: 1 })
  const options = check(given)
  t.strictSame(structuredClone({ ...given, plugins: 1 }), before)
  t.notOk(Object.isFrozen(given) || Object.isFrozen(given.pool) || Object.isFrozen(given.connection))
  given.connection.host = 'two'
  given.pool.size = 3
  given.pool.prePing.idleMillis = 6
  given.plugins.pop()
  t.match(options, { pool: { connection: { host: 'one' }, size: 2, prePing: { idleMillis: 5 } } })
  t.equal(options.plugins.length, 1)
  const { pool, route, plugins } = options
  for (const part of [options, pool, pool.connection, pool.prePing, route, plugins]) t.ok(Object.isFrozen(part))
})

t.test('a route lays its options over the plugin’s', async (t) => {
  t.equal(checkRouteOptions(DEFAULTS, undefined, ROUTE), DEFAULTS)
  const route = checkRouteOptions(DEFAULTS, { readOnly: true, autocommit: true, commitOn: undefined }, ROUTE)
  t.match(route, { ...DEFAULTS, readOnly: true, autocommit: true })
  t.ok(Object.isFrozen(route))
  t.match(checkRouteOptions(route, { readOnly: false }, ROUTE), { readOnly: false, autocommit: true })
})

t.test('a route refuses what it cannot take, and says which route', async (t) => {
  const names = ['commitOn', 'shouldCommit', 'isolationLevel', 'readOnly', 'deferrable', 'statementTimeoutMillis']
  const wrong = [
    ...names.flatMap((name) => WRONG[name]!.map((value) => [name, value] as const)),
    ...notBoolean.map((value) => ['autocommit', value] as const),
    ...['pool', 'connectionString', 'settings', 'retries', 'toString'].map((name) => [name, undefined] as const),
  ]
  for (const [name, value] of wrong) {
    t.throws(() => checkRouteOptions(DEFAULTS, { [name]: value }, ROUTE), {
      code: 'FST_REQUEST_DB_INVALID_OPTION',
      message: new RegExp(`^Option config\\.db of GET /trips\\.${name}: expected `),
    })
  }
  for (const notAnObject of [null, 5, true, 'serializable', []]) {
    t.throws(() => checkRouteOptions(DEFAULTS, notAnObject, ROUTE), { message: /^Option config\.db of GET \/trips: / })
  }
})

t.test('a session outside of a request refuses what it cannot take', async (t) => {
  const wrong: [string, unknown][] = [
    ...['isolationLevel', 'deferrable', 'statementTimeoutMillis'].flatMap((name) =>
      WRONG[name]!.map((value): [string, unknown] => [name, value]),
    ),
    ...notBoolean.map((value): [string, unknown] => ['autocommit', value]),
    ['readOnly', () => true],
    ['readOnly', 'yes'],
    ['settings', () => ({})],
    ['settings', 'app.tenant'],
    ['name', 5],
    ['commitOn', 'onSend'],
    ['shouldCommit', () => true],
  ]
  for (const [name, value] of wrong) {
    t.throws(() => checkSessionOptions(DEFAULTS, { [name]: value } as SessionOptions), {
      code: 'FST_REQUEST_DB_INVALID_OPTION',
      message: new RegExp(`^Option session\\.${name}: expected `),
    })
  }
  const session = checkSessionOptions(DEFAULTS, { readOnly: true, name: 'job', settings: { 'app.tenant': '1' } })
  t.match(session.route, { ...DEFAULTS, readOnly: true })
  const asking = checkRouteOptions(DEFAULTS, { readOnly: () => true }, ROUTE)
  t.equal(checkSessionOptions(asking, {}).route.readOnly, false, 'a rule that needs a request says nothing without one')
})

t.test(
  'register refuses, takes Fastify’s own options, and logs what is in force, once and without secrets',
  async (t) => {
    const refused = Fastify()
    await t.rejects(
      async () => {
        await refused.register(requestDb, { connectionString, pool: { size: 0 } })
      },
      { code: 'FST_REQUEST_DB_INVALID_OPTION', message: /pool\.size/ },
    )
    t.notOk(refused.hasDecorator('db'))
    const log: string[] = []
    const app = Fastify({ logger: { stream: { write: (line: string) => log.push(line) } } })
    const fastifys = { prefix: '/api', logLevel: 'info' as const, logSerializers: {} }
    await app.register(requestDb, {
      connectionString,
      pool: { size: 16, maxOverflow: 4 },
      decorator: 'trips',
      ...fastifys,
    } as RequestDbOptions)
    await app.ready()
    t.match(
      log.map((line) => JSON.parse(line)),
      [
        {
          msg: 'request-db: pool "trips" of size 16 overflow 4',
          requestDb: { name: 'trips', size: 16, maxOverflow: 4, timeoutMillis: 10_000, maxWaiting: 1000 },
        },
      ],
    )
    t.equal(log.length, 1)
    t.notMatch(log.join(''), /secret|somebody|db\.example/)
    await app.close()
  },
)

t.test('a wrong route option stops the app from starting', async (t) => {
  const app = Fastify()
  await app.register(requestDb, { connectionString })
  t.throws(() => app.get('/trips', { config: { db: { commitOn: 'never' as 'onSend' } } }, async () => ''), {
    code: 'FST_REQUEST_DB_INVALID_OPTION',
    message: /^Option config\.db of GET \/trips\.commitOn: /,
  })
  await app.close()
})
