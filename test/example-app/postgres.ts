import { spawn } from 'node:child_process'
import { chmod, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import pg from 'pg'
import t, { type Test } from 'tap'
import { type PostgresOptions, startPostgres } from '../../example-app/postgres.ts'
import { isRunning } from '../../example-app/process.ts'

t.setTimeout(120_000)
const isRoot = process.getuid?.() === 0
const place = await mkdtemp(join(tmpdir(), 'fastify-request-db-postgres-'))
await chmod(place, 0o755)
t.teardown(() => rm(place, { recursive: true, force: true }))
const folder = join(place, 'data')

async function start(t: Test, options: Partial<PostgresOptions> = {}) {
  const said: string[] = []
  const postgres = await startPostgres({ folder, say: (line) => said.push(line), ...options })
  t.teardown(() => postgres.stop())
  return { postgres, said }
}

async function query(connectionString: string, text: string): Promise<Record<string, unknown>[]> {
  const client = new pg.Client({ connectionString })
  await client.connect()
  try {
    return (await client.query(text)).rows
  } finally {
    await client.end()
  }
}

async function cluster(): Promise<string> {
  return join(folder, (await readdir(folder)).find((name) => /^\d+$/.test(name)) ?? 'none')
}

t.test('it sets up PostgreSQL once, and keeps the data', async (t) => {
  const first = await start(t, { flags: ['max_connections=17'] })
  t.same(first.said, ['Setting up PostgreSQL, this once'])
  const { connectionString, pid } = first.postgres
  const settings = `select current_setting('server_version') like '18.%' as version, current_setting('max_connections') as max,
    current_setting('listen_addresses') as addresses, current_setting('unix_socket_directories') as sockets`
  t.same(await query(connectionString, settings), [{ version: true, max: '17', addresses: '127.0.0.1', sockets: '' }])
  await query(connectionString, 'create table kept as select 1 as one')
  await Promise.all([first.postgres.stop(), first.postgres.stop()])
  t.notOk(await isRunning(pid))

  const second = await start(t)
  t.same(second.said, [])
  t.same(await query(second.postgres.connectionString, 'select * from kept'), [{ one: 1 }])
  await second.postgres.stop()
})

t.test('it takes the port it is told', async (t) => {
  const before = await start(t)
  await before.postgres.stop()
  const { postgres } = await start(t, { port: before.postgres.port })
  t.equal(postgres.port, before.postgres.port)
  await postgres.stop()
})

t.test('what a killed run has not finished is made anew', async (t) => {
  const unfinished = `${await cluster()}.new-99999999`
  await mkdir(unfinished)
  await writeFile(join(unfinished, 'password'), 'half')
  const { postgres } = await start(t)
  t.same((await readdir(folder)).length, 1)
  await postgres.stop()
})

t.test('data that are in use are left alone', async (t) => {
  const { postgres } = await start(t)
  await t.rejects(startPostgres({ folder }), /are in use by process \d+/)
  t.ok(await isRunning(postgres.pid))
  await postgres.stop()
})

t.test('it starts although postmaster.pid names', async (t) => {
  const pidFile = join(await cluster(), 'data', 'postmaster.pid')
  const stranger = spawn(process.execPath, ['-e', 'setTimeout(() => {}, 60000)'])
  t.teardown(() => stranger.kill())
  const contents = [
    ['a process that is none of ours', `${stranger.pid}\n${join(await cluster(), 'data')}\n1\n5432\n`],
    ['a process that is gone', `99999999\n${join(await cluster(), 'data')}\n1\n5432\n`],
    ['nobody', ''],
  ] as const
  for (const [name, content] of contents) {
    await t.test(name, async (t) => {
      await writeFile(pidFile, content)
      const { postgres } = await start(t)
      t.match(await readFile(pidFile, 'utf8'), new RegExp(`^${postgres.pid}\n`))
      await postgres.stop()
    })
  }
  t.ok(stranger.exitCode === null && stranger.signalCode === null, 'which goes on')
})

t.test('after a crash of PostgreSQL it starts again', async (t) => {
  const { postgres } = await start(t)
  process.kill(postgres.pid, 'SIGKILL')
  await postgres.stop()
  const again = await start(t)
  t.same(await query(again.postgres.connectionString, 'select 1 as one'), [{ one: 1 }])
  await again.postgres.stop()
})

t.test('a setting it does not take is named', async (t) => {
  await t.rejects(startPostgres({ folder, flags: ['max_connections=many'] }), /max_connections/)
})

t.test('below a folder that the user postgres may not enter it moves to another', { skip: !isRoot }, async (t) => {
  const closed = join(place, 'closed')
  await mkdir(closed, { mode: 0o700 })
  const { postgres, said } = await start(t, { folder: join(closed, 'data') })
  const other = said[0]?.split(' ').at(-1) ?? ''
  t.match(said[0], /^The user postgres may not enter .*closed\/data: PostgreSQL and its data are in \/.*/)
  t.teardown(async () => {
    await postgres.stop()
    await rm(other, { recursive: true })
  })
  t.same(await query(postgres.connectionString, 'select 1 as one'), [{ one: 1 }])
})
