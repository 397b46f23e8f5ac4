import pg from 'pg'
import { isFatal, mapValues, Step } from '../../lib/pool/flight.ts'
import { createDatabase } from '../support/database.ts'
import { asking, fly, openConnection, rowsOf } from '../support/open-connection.ts'
import { startProxy } from '../support/proxy.ts'
import { NOTES } from '../support/schema.ts'
import { type Test, t } from '../support/test.ts'

const database = await createDatabase(t, { sql: NOTES })

async function setUp(t: Test, config: object = {}) {
  const proxy = await startProxy(t, database.connectionString)
  const connection = await openConnection(t, { connectionString: proxy.connectionString, ...config })
  return { proxy, connection }
}

t.test('all of a flight leaves in one piece under one Sync, and lands when all of it is answered', async (t) => {
  const { proxy, connection } = await setUp(t)
  const completed: string[] = []
  const begin = new Step({ text: 'BEGIN', flush: true, prefix: true }, () => {})
  begin.onComplete = () => completed.push('BEGIN')
  const insert = new Step(
    { text: 'insert into notes (note) values ($1) returning note', values: ['a'], describe: true },
    () => {},
  )
  insert.onComplete = () => completed.push('insert')
  const commit = new Step({ text: 'COMMIT' }, () => {})
  const { flight, status } = await fly(connection, [begin, insert, commit])
  t.equal(status, 'I')
  t.equal(flight.at, 3)
  t.equal(flight.error, undefined)
  t.strictSame(completed, ['BEGIN', 'insert'])
  t.match(insert.result, { command: 'INSERT', rowCount: 1, rows: [{ note: 'a' }] })
  t.equal(commit.tag, 'COMMIT')
  t.ok([begin, insert, commit].every((step) => step.completed && !step.suspended))
  t.match(proxy.flights, [{ messages: 'PBEHPBDEPBES', chunks: 1, tags: ['BEGIN', 'INSERT 0 1', 'COMMIT'] }])
  t.equal(proxy.roundTrips(), 1)
})

t.test('BEGIN is answered before the statement behind it is through', async (t) => {
  const { proxy, connection } = await setUp(t)
  const begun = new Promise<void>((resolve) => {
    const begin = new Step({ text: 'BEGIN', flush: true }, () => {})
    begin.onComplete = resolve
    void fly(connection, [begin, ...asking('select pg_sleep(30)')])
  })
  await begun
  t.strictSame(proxy.flights[0]?.tags, ['BEGIN'])
  connection.kill(new Error('the test is over'))
})

t.test('after a failure the server does none of the rest, and says which step it was', async (t) => {
  const { connection } = await setUp(t)
  const steps = asking('select 1 as a', 'select 1/0', 'select 2', 'select 3')
  const { flight, status } = await fly(connection, steps)
  t.equal(status, 'I')
  t.equal(flight.at, 1)
  t.match(flight.error, { code: '22012' })
  t.strictSame(
    steps.map(({ completed }) => completed),
    [true, false, false, false],
  )
  t.strictSame(steps[0]!.result!.rows, [{ a: 1 }])
  t.strictSame(await rowsOf(connection, 'select 4 as b'), [{ b: 4 }], 'the connection is as good as before')
})

t.test('the status of a transaction is the server’s word', async (t) => {
  const { connection } = await setUp(t)
  t.equal((await fly(connection, asking('begin'))).status, 'T')
  t.equal((await fly(connection, asking('select 1/0'))).status, 'E')
  t.equal((await fly(connection, asking('commit'))).status, 'I')
})

t.test('flights land in the order in which they left, each with its own rows', async (t) => {
  const { connection } = await setUp(t)
  const landed: number[] = []
  const all = Array.from({ length: 50 }, async (_, i) => {
    const steps = asking(i % 7 === 3 ? 'select 1/0' : `select ${i} as i`)
    const { flight } = await fly(connection, steps)
    landed.push(i)
    if (i % 7 === 3) t.match(flight.error, { code: '22012' })
    else t.strictSame(steps[0]!.result!.rows, [{ i }])
  })
  await Promise.all(all)
  t.strictSame(
    landed,
    Array.from({ length: 50 }, (_, i) => i),
  )
})

t.test('a flight without steps is a bare Sync', async (t) => {
  const { proxy, connection } = await setUp(t)
  t.match(await fly(connection, []), { status: 'I', flight: { at: 0 } })
  t.match(proxy.flights, [{ messages: 'S', statements: [] }])
})

t.test('a portal is read in chunks, and closed', async (t) => {
  const { proxy, connection } = await setUp(t)
  await fly(connection, asking('begin'))
  const text = 'select generate_series(1, 5) as i'
  const first = new Step({ text, describe: true, portal: 'p1', rows: 2 }, () => {})
  await fly(connection, [first])
  t.strictSame(first.result!.rows, [{ i: 1 }, { i: 2 }])
  t.ok(first.suspended && first.completed)
  const next = new Step({ portal: 'p1', rows: 2 }, () => {})
  next.result = first.result
  next.result!.rows = []
  await fly(connection, [next])
  t.strictSame(next.result!.rows, [{ i: 3 }, { i: 4 }], 'the description of the first chunk serves')
  const close = new Step({ portal: 'p1', closes: true }, () => {})
  t.equal((await fly(connection, [close])).status, 'T')
  const gone = await fly(connection, [new Step({ portal: 'p1', rows: 2 }, () => {})])
  t.match(gone.flight.error, { code: '34000' })
  t.strictSame(
    proxy.flights.map(({ messages }) => messages),
    ['PBDES', 'PBDES', 'ES', 'CS', 'ES'],
  )
})

t.test('a portal whose rows end exactly with the chunk is not suspended for good', async (t) => {
  const { connection } = await setUp(t)
  await fly(connection, asking('begin'))
  const first = new Step({ text: 'select generate_series(1, 2) as i', describe: true, portal: 'p', rows: 2 }, () => {})
  await fly(connection, [first])
  const last = new Step({ portal: 'p', rows: 2 }, () => {})
  last.result = first.result
  await fly(connection, [last])
  t.equal(last.suspended, false)
  t.equal(last.result!.rows.length, 2)
})

t.test('statements that say nothing, change nothing, or return nothing', async (t) => {
  const { connection } = await setUp(t)
  const [empty, comment, none, update] = asking('', '-- nothing', 'select 1 where false', 'delete from notes')
  const { flight } = await fly(connection, [empty!, comment!, none!, update!])
  t.equal(flight.error, undefined)
  t.match(empty!.result, { command: null, rows: [] })
  t.match(comment!.result, { command: null, rows: [] })
  t.match(none!.result, { command: 'SELECT', rowCount: 0, rows: [] })
  t.match(update!.result, { command: 'DELETE', rowCount: 1, rows: [] })
})

t.test('a row that cannot be parsed is the error of its step, and the connection goes on', async (t) => {
  const types = {
    getTypeParser: (oid: number) => (text: string) => {
      if (oid === pg.types.builtins.DATE) throw new Error('dates are not for me')
      if (oid === pg.types.builtins.UUID) throw undefined
      return text
    },
  }
  const { connection } = await setUp(t, { types })
  const steps = asking("select date '2024-01-01' as d union all select '2024-01-02'", 'select 5 as i')
  const { flight } = await fly(connection, steps)
  t.equal(flight.error, undefined)
  t.match(steps[0]!.rowError, { message: 'dates are not for me' })
  t.strictSame(steps[1]!.result!.rows, [{ i: '5' }])
  const [nothing] = asking("select '00000000-0000-0000-0000-000000000000'::uuid")
  await fly(connection, [nothing!])
  t.match(nothing!.rowError, Error, 'also where nothing was thrown')
})

t.test('binary results are asked for where the client is binary', async (t) => {
  const { connection } = await setUp(t, { binary: true })
  t.strictSame(await rowsOf(connection, 'select 42::int4 as i, true as b'), [{ i: 42, b: true }])
})

t.test('COPY TO delivers no rows and ends in good order; COPY FROM STDIN ends the connection', async (t) => {
  const { connection } = await setUp(t)
  const { flight } = await fly(connection, asking('copy (select 1) to stdout'))
  t.equal(flight.error, undefined)
  t.strictSame(await rowsOf(connection, 'select 1 as i'), [{ i: 1 }])
  const lost = await fly(connection, asking('copy notes from stdin'))
  t.match(lost, { death: { message: /withClient/ }, reached: true })
})

t.test('values are mapped as pg maps them, and what cannot be mapped throws before anything is sent', async (t) => {
  const date = new Date(0)
  t.strictSame(mapValues([null, undefined, 'text', 5, true, 12n]), [null, null, 'text', '5', 'true', '12'])
  t.match(mapValues([date])[0], /^1970-01-01T|^1969-12-31T/)
  t.strictSame(mapValues([{ a: 1 }, [1, 'b', null]]), ['{"a":1}', '{"1","b",NULL}'])
  t.strictSame(mapValues([Buffer.from('x')]), [Buffer.from('x')])
  t.strictSame(mapValues([{ toPostgres: () => 'mine' }]), ['mine'])
  const circular: { self?: object } = {}
  circular.self = circular
  for (const value of [
    circular,
    {
      toPostgres: () => {
        throw new Error('mine')
      },
    },
  ]) {
    t.throws(() => mapValues([1, value]))
  }
})

t.test('what ends a connection is told from what only fails a statement', async (t) => {
  const said = (severity: string, code: string) =>
    Object.assign(new pg.DatabaseError('text', 4, 'error'), { severity, code })
  for (const error of [
    said('FATAL', '57P01'),
    said('PANIC', 'XX000'),
    said('FATAL', '28000'),
    said('FATALE', '57P01'),
    said('FEHLER', '57P02'),
    said('ERROR', '57P05'),
    said('FATAL', '25P03'),
    said('SCHWERWIEGEND', '25P04'),
    new Error('Connection terminated unexpectedly'),
  ]) {
    t.ok(isFatal(error), String(error))
  }
  for (const code of ['57014', '25P02', '25P01', '40001', '23505', '42601', '08P01', '53100', 'P0001']) {
    t.notOk(isFatal(said('ERROR', code)), code)
  }
})
