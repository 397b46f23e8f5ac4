import { inspect } from 'node:util'
import Fastify from 'fastify'
import requestDb, { type RequestDbOptions } from '../../lib/index.ts'
import { pidOf } from '../support/notebook.ts'
import { t } from '../support/test.ts'

// What pg throws on the spot, instead of reporting it, when it is told to connect.
const server = { host: '127.0.0.1', port: 1, user: 'somebody', password: 'secret' }
const IMPOSSIBLE: Record<string, RequestDbOptions> = {
  'a URL with a broken escape': { connectionString: 'postgres://somebody:secret%zz@127.0.0.1:1/db' },
  'a URL with an impossible port': { connectionString: 'postgres://somebody:secret@127.0.0.1:99999999/db' },
  'a CA file that is not there': {
    connectionString: 'postgres://somebody:secret@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/no/such/file',
  },
  'a URL of another database': { connectionString: 'mysql://somebody:secret@127.0.0.1:1/db' },
  'an unknown way to negotiate TLS': { connection: { ...server, sslnegotiation: 'nonsense' as 'direct' } },
  'direct TLS without TLS': { connection: { ...server, sslnegotiation: 'direct' } },
  'an impossible port': { connection: { ...server, port: 99_999_999 } },
  'a port that is a word': { connection: { ...server, port: 'five' as unknown as number } },
  'a host that is a number': { connection: { ...server, host: 42 as unknown as string } },
  'ssl that is a word': { connection: { ...server, ssl: 'yes' as unknown as boolean } },
  'a stream that throws': {
    connection: {
      ...server,
      stream: () => {
        throw new Error('no stream today')
      },
    },
  },
  'a client certificate that is none': { connection: { ...server, ssl: { cert: 'nonsense', key: 'nonsense' } } },
  'a user that is a symbol': { connection: { ...server, user: Symbol('user') as unknown as string } },
}

for (const [title, options] of Object.entries(IMPOSSIBLE)) {
  t.test(`${title} is refused at register, or UNAVAILABLE again and again`, async (t) => {
    const errors: Error[] = []
    const app = Fastify()
    app.addHook('onError', async (_request, _reply, error) => void errors.push(error))
    const pool = { size: 1, timeoutMillis: 500 }
    try {
      await app.register(requestDb, { ...options, pool, closeGraceMillis: 2000 })
    } catch (error) {
      t.match(error, { code: 'FST_REQUEST_DB_INVALID_OPTION', message: /^Option connection/ })
      t.notMatch(inspect(error, { depth: 9, showHidden: true }), /secret/)
      return
    }
    app.get('/', ({ db }) => pidOf(db))
    for (let i = 0; i < 3; i++) {
      const answer = await app.inject('/')
      t.match(answer.json(), { statusCode: 503, code: 'FST_REQUEST_DB_UNAVAILABLE' })
      t.notMatch(answer.body, /secret|somebody|127\.0\.0\.1|no.such/)
    }
    t.ok(errors[0]?.cause, 'there is a reason')
    t.notMatch(inspect(errors, { depth: 9, showHidden: true }), /secret/)
    t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0, waiters: [], totals: { failedConnects: 3 } })
    const since = performance.now()
    await app.close()
    t.ok(performance.now() - since < 1000)
  })
}
