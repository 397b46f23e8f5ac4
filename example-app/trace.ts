import type { FastifyInstance } from 'fastify'
import { buildApp } from './app.ts'
import { onPostgres } from './temporary.ts'

// `npm run demo:trace`: the life of a session in five cases, as echo and echoPool log it, beside SQLAlchemy's.

const WIDTH = 66

interface Case {
  readonly name: string
  readonly path: string
  readonly code: readonly string[]
  /** What `echo=True, echo_pool="debug"` of SQLAlchemy 2 prints for the same, shortened. */
  readonly sqlAlchemy: readonly string[]
}

const CASES: readonly Case[] = [
  {
    name: 'add, flush, commit',
    path: '/add',
    code: ['request.db.add(insert)', 'await request.db.flush()'],
    sqlAlchemy: ['checked out', 'BEGIN (implicit)', 'INSERT', 'COMMIT', 'returned'],
  },
  {
    name: 'one read',
    path: '/read',
    code: ['await request.db.selectFrom(…).execute()'],
    sqlAlchemy: ['checked out', 'BEGIN (implicit)', 'SELECT', 'ROLLBACK', 'returned'],
  },
  {
    name: 'a session that is never used',
    path: '/unused',
    code: ["return 'nothing to ask'"],
    sqlAlchemy: [],
  },
  {
    name: 'add, flush, no commit',
    path: '/refused',
    code: ['request.db.add(insert)', 'await request.db.flush()', 'reply.code(409)'],
    sqlAlchemy: ['checked out', 'BEGIN (implicit)', 'INSERT', 'ROLLBACK', 'returned'],
  },
  {
    name: 'an explicit begin block',
    path: '/block',
    code: ['await request.db.transaction().execute((db) => insert)'],
    sqlAlchemy: ['checked out', 'BEGIN (implicit)', 'INSERT', 'COMMIT', 'returned'],
  },
]

function routes(app: FastifyInstance): void {
  const trip = { passenger: 'Ada', email: 'ada@example.com' }

  app.get('/add', async ({ db }) => {
    db.add(db.insertInto('trips').values(trip))
    await db.flush()
    return 'added'
  })

  app.get('/read', ({ db }) => db.selectFrom('airports').select('city').where('iata', '=', 'LHR').execute())

  app.get('/unused', async () => 'nothing to ask')

  app.get('/refused', async ({ db }, reply) => {
    db.add(db.insertInto('trips').values(trip))
    await db.flush()
    return reply.code(409).send('refused after all')
  })

  app.get('/block', async ({ db }) => {
    await db.transaction().execute((db) => db.insertInto('trips').values(trip).execute())
    return 'added'
  })
}

await onPostgres(async (connectionString) => {
  const lines: string[] = []
  const stream = {
    write(text: string) {
      const { reqId, requestDb, msg } = JSON.parse(text) as { reqId?: string; requestDb?: object; msg: string }
      // What no request did, and what Fastify itself logs, is not of interest here.
      if (reqId !== undefined && requestDb !== undefined) lines.push(`${reqId}  ${msg}`)
    },
  }
  const app = buildApp({
    connectionString,
    mailer: { send: async () => {} },
    echo: true,
    echoPool: true,
    logger: { level: 'info', stream },
  })
  routes(app)
  try {
    for (const [index, { name, path, code, sqlAlchemy }] of CASES.entries()) {
      await app.inject(path)
      const ours = lines.splice(0)
      console.log(`\n${index + 1}. ${name}\n`)
      for (const line of code) console.log(`     ${line}`)
      console.log(`\n   ${'what is logged'.padEnd(WIDTH)}  SQLAlchemy`)
      if (ours.length === 0) ours.push('(nothing)')
      const theirs = sqlAlchemy.length === 0 ? ['(nothing)'] : sqlAlchemy
      for (let row = 0; row < Math.max(ours.length, theirs.length); row++) {
        console.log(`   ${fit(ours[row] ?? '')}  ${theirs[row] ?? ''}`.trimEnd())
      }
    }
  } finally {
    await app.close()
  }
  console.log(`
Less work: BEGIN leaves in the packet of the first statement, and what was added but not flushed in the packet of COMMIT.
More work: the request is a transaction already, so that a block in it is a savepoint, which can be undone alone.`)
})

function fit(line: string): string {
  // The end of a statement's line, its duration and rows, is worth more than its middle.
  if (line.length <= WIDTH) return line.padEnd(WIDTH)
  const end = line.slice(line.lastIndexOf(' ['))
  return `${line.slice(0, WIDTH - end.length - 2)} …${end}`
}
