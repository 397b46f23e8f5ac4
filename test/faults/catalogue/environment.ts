import { createServer, type LookupFunction, Socket } from 'node:net'
import { inspect } from 'node:util'
import { sql } from 'kysely'
import pg from 'pg'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { add, isGone } from '../../support/notebook.ts'
import { type Scene, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* Servers that cannot be reached or refuse, and what they are sent. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, { sql: `${NOTES}; create table ids (id uuid primary key)` })
const UNAVAILABLE = '503 UNAVAILABLE'
const { pathname } = new URL(database.connectionString)
const address = { database: pathname.slice(1), user: 'postgres', password: 'postgres' }

/** The same request while no connection can be had, and after `heal`. */
async function failsAndHeals(scene: Scene, heal: () => unknown) {
  const failed = await scene.post()
  scene.t.match(scene.app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  await heal()
  return [failed, await scene.post()]
}

scenario(database, '100 refused on both address families', async (scene) => {
  const closed = createServer().listen(0)
  await eventually(() => closed.listening)
  const { port } = closed.address() as { port: number }
  closed.close()
  const connection = { ...address, host: 'localhost', port }
  await scene.open({ connection, isOpen: false, handler: writes('kept') })
  const answer = await scene.post()
  scene.t.match(inspect(scene.log.lines, { depth: 9 }), /ECONNREFUSED/, 'the reason is in the log')
  scene.t.match(scene.app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0 })
  return { answers: [answer], expected: [UNAVAILABLE], rows: [], next: 'unavailable' }
})

scenario(database, '101 a name that does not resolve, until it does', async (scene) => {
  let resolves = false
  const { hostname, port } = new URL(scene.proxy.connectionString)
  const lookup: LookupFunction = (name, options, done) => {
    const error = Object.assign(new Error(`getaddrinfo ENOTFOUND ${name}`), { code: 'ENOTFOUND' })
    if (!resolves) done(error, '')
    else if (options.all) done(null, [{ address: hostname, family: 4 }])
    else done(null, hostname, 4)
  }
  class NamedSocket extends Socket {
    override connect(...[port, host]: unknown[]): this {
      return super.connect({ port: port as number, host: host as string, lookup })
    }
  }
  const stream = () => new NamedSocket()
  const connection = { ...address, host: 'db.example', port: Number(port), stream }
  await scene.open({ connection, isOpen: false, handler: writes('kept') })
  const answers = await failsAndHeals(scene, () => {
    resolves = true
  })
  return { answers, expected: [UNAVAILABLE, 200], rows: ['kept'] }
})

for (const [what, wrong] of [
  ['28P01 a wrong password', { password: 'open sesame' }],
  ['3D000 no such database', { database: 'no_such_database' }],
] as const) {
  scenario(database, `102 ${what}`, async (scene) => {
    const { hostname, port } = new URL(scene.proxy.connectionString)
    const connection = { ...address, host: hostname, port: Number(port), ...wrong }
    await scene.open({ connection, isOpen: false, handler: writes('lost') })
    const answer = await scene.post()
    const told = answer.body + inspect(scene.log.lines, { depth: 10 })
    scene.t.notMatch(told, /open sesame/)
    scene.t.notMatch(answer.body, /postgres|no_such_database/)
    return { answers: [answer], expected: [UNAVAILABLE], rows: [], next: 'unavailable' }
  })
}

scenario(database, '103 53300 every slot is taken', async (scene) => {
  const role = await database.role("login password 'limited' connection limit 1")
  await database.query(`grant all on notes to ${role}; grant usage on all sequences in schema public to ${role}`)
  const url = Object.assign(new URL(scene.proxy.connectionString), { username: role, password: 'limited' })
  const taken = new pg.Client({ connectionString: url.href })
  await taken.connect()
  await scene.open({ connectionString: url.href, isOpen: false, pool: { size: 1 }, handler: writes('kept') })
  const { rows } = await taken.query<{ pid: number }>('select pg_backend_pid() as pid')
  const answers = await failsAndHeals(scene, async () => {
    await taken.end()
    await eventually(() => isGone(database, rows[0]!.pid))
  })
  return { answers, expected: [UNAVAILABLE, 200], rows: ['kept'] }
})

scenario(database, '104 57P03 the server is starting up', async (scene) => {
  await scene.open({ isOpen: false, handler: writes('kept') })
  scene.proxy.failStartup('57P03', 2)
  const answers = [await scene.post(), await scene.post(), await scene.post()]
  return {
    answers,
    expected: [UNAVAILABLE, UNAVAILABLE, 200],
    rows: ['kept'],
    totals: { failedConnects: 2, opened: 1 },
  }
})

scenario(database, '105 PgBouncer refuses start-up parameters', async (scene) => {
  scene.proxy.refuseParameters('statement_timeout', 'options', 'idle_in_transaction_session_timeout')
  await scene.open({
    statementTimeoutMillis: 1234,
    pool: { prePing: false },
    handler: async (db) => {
      const { rows } = await sql<{ limit: string }>`select current_setting('statement_timeout') as limit`.execute(db)
      scene.t.equal(rows[0]?.limit, '1234ms')
      return writes('kept')(db)
    },
  })
  const answers = [await scene.post(), await scene.post()]
  scene.t.strictSame(
    scene.proxy
      .statements()
      .flat()
      .filter((text) => /discard|prepare/i.test(text)),
    [],
  )
  return { answers, expected: [200, 200], rows: ['kept', 'kept'] }
})

for (const [what, value, code] of [
  ['a NUL byte', 'a\0b', '22021'],
  ['a uuid that is none', undefined, '22P02'],
  [
    'a parameter whose toPostgres throws',
    {
      toPostgres: () => {
        throw Object.assign(new Error('mine'), { code: 'MINE' })
      },
    },
    'MINE',
  ],
] as const) {
  scenario(database, `106 ${what}`, async (scene) => {
    await scene.open({
      handler: async (db) => {
        await add(db, 'lost')
        if (value === undefined) await sql`insert into ids values (${'no uuid'})`.execute(db)
        else await add(db, value as string)
        return 'done'
      },
    })
    return { answers: [await scene.post()], expected: [`500 ${code}`], rows: [], connection: 'reused' }
  })
}

scenario(database, '107 what is said of errors', async (scene) => {
  await scene.open({
    handler: async (db) => {
      const id = '00000000-0000-0000-0000-000000000000'
      await sql`insert into ids values (${id}), (${id})`.execute(db)
    },
    routes: (app) => {
      app.post('/lost', async ({ db }) => {
        await add(db, 'lost')
        await sql`select pg_terminate_backend(pg_backend_pid())`.execute(db)
      })
    },
  })
  const answers = [await scene.post(), await scene.post('/lost')]
  scene.t.notMatch(answers[1]?.body, /postgres|terminat|127\.0|notes/)
  return { answers, expected: ['500 23505', '503 CONNECTION_LOST'], rows: [] }
})
