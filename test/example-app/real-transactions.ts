import { once } from 'node:events'
import { connect } from 'node:net'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { buildApp } from '../../example-app/app.ts'
import { createDatabase, type Database } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'

interface Stage {
  app: FastifyInstance
  database: Database
}

/* What takes place between several transactions, or several apps. */

/** A test with an app and a database of its own. Nothing is checked out when it ends. */
function appTest(name: string, body: (t: Test, stage: Stage) => Promise<void>): void {
  t.test(name, async (t) => {
    const database = await createDatabase(t)
    const mailer = { send: async () => {} }
    const app = buildApp({ connectionString: database.connectionString, mailer })
    t.teardown(() => app.close())
    await app.ready()
    await body(t, { app, database })
    await eventually(() => app.db.snapshot().checkedOut === 0 && app.db.snapshot().waiting === 0)
    t.same(new Set((await database.backends()).map(({ state }) => state)), new Set(['idle']), 'no transaction is open')
  })
}

const ada = { passenger: 'Ada Lovelace', email: 'ada@example.org' }
const there = { from: 'LHR', to: 'JFK' }
const onwards = { from: 'JFK', to: 'ACK' }
const bookTrip = (app: FastifyInstance, body: object) => app.inject({ method: 'POST', url: '/trips', payload: body })

async function leave(database: Database, seats: number, { from, to } = there): Promise<void> {
  await database.query('update flights set seats_left = $1 where origin = $2 and destination = $3', [seats, from, to])
}

async function seatsLeft(database: Database, { from, to } = there): Promise<number | undefined> {
  const text = 'select seats_left from flights where origin = $1 and destination = $2'
  return (await database.query<{ seats_left: number }>(text, [from, to]))[0]?.seats_left
}

appTest(
  'the airports are loaded once, and a second start leaves the seats as they are',
  async (t, { app, database }) => {
    const [counted] = await database.query<{ count: number }>('select count(*)::integer from airports')
    t.ok((counted?.count ?? 0) > 6000)
    await leave(database, 3)
    const again = buildApp({ connectionString: database.connectionString, mailer: { send: async () => {} } })
    await again.ready()
    await again.close()
    t.equal(await seatsLeft(database), 3)
    t.same(await database.query('select count(*)::integer from airports'), [counted])
    t.equal((await app.inject('/airports?q=LHR')).json().airports[0].name, 'London Heathrow Airport')
  },
)

appTest('two apps can start on an empty database at once', async (t, { database }) => {
  await database.query('drop table legs, trips, flights, airports')
  const two = [1, 2].map(() =>
    buildApp({ connectionString: database.connectionString, mailer: { send: async () => {} } }),
  )
  await Promise.all(two.map((app) => app.ready()))
  await Promise.all(two.map((app) => app.close()))
  t.ok((await database.rows('flights')).length > 0)
})

appTest('many who want the last seats get as many as there are', async (t, { app, database }) => {
  await leave(database, 3)
  await leave(database, 100, onwards)
  const legs = [there, onwards]
  const answers = await Promise.all(
    Array.from({ length: 12 }, (_, i) => bookTrip(app, { ...ada, legs: i % 2 ? legs : legs.toReversed() })),
  )
  const statuses = answers.map(({ statusCode }) => statusCode).sort()
  t.same(statuses, [...Array(3).fill(201), ...Array(9).fill(409)])
  t.equal(await seatsLeft(database), 0)
  t.equal(await seatsLeft(database, onwards), 97)
})

appTest('a client that leaves in the middle of the export leaves nothing behind', async (t, { app, database }) => {
  await database.query(
    `insert into trips (passenger, email) select 'No ' || n, 'x@example.org' from generate_series(1, 50000) n`,
  )
  const { hostname, port } = new URL(await app.listen({ port: 0, host: '127.0.0.1' }))
  const client = connect(Number(port), hostname)
  client.write('GET /trips/export HTTP/1.1\r\nHost: localhost\r\n\r\n')
  const [chunk] = await once(client, 'data')
  t.match(String(chunk), /id,passenger/)
  t.equal(app.db.snapshot().checkedOut, 1)
  client.destroy()
  await eventually(() => app.db.snapshot().checkedOut === 0)
  t.equal(app.db.snapshot().totals.rollbacks, 1)
})
