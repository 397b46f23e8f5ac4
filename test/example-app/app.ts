import type { FastifyInstance } from 'fastify'
import { beginTest, type TestTransaction } from 'fastify-request-db/testing'
import { CompiledQuery, sql } from 'kysely'
import t, { type Test } from 'tap'
import { buildApp } from '../../example-app/app.ts'
import type { Mail } from '../../example-app/mailer.ts'
import { createDatabase } from '../support/database.ts'

/* One app and one database for all tests: each is a transaction, which is rolled back. */

const { connectionString } = await createDatabase(t)
const mails: Mail[] = []
const app = buildApp({ connectionString, mailer: { send: async (mail) => void mails.push(mail) } })
t.teardown(() => app.close())

const database = {
  query: async <Row>(text: string, values: unknown[] = []) =>
    (await app.db.kysely.executeQuery<Row>(CompiledQuery.raw(text, values))).rows,
  rows: async (table: string) => (await sql`select * from ${sql.table(table)}`.execute(app.db.kysely)).rows,
}
type Database = typeof database

interface Stage {
  app: FastifyInstance
  database: Database
  mails: Mail[]
  transaction: TestTransaction
}

/** A test whose rows nobody else sees, and that leaves none. */
function appTest(name: string, body: (t: Test, stage: Stage) => Promise<void>): void {
  t.test(name, async (t) => {
    mails.length = 0
    const transaction = await beginTest(app)
    try {
      await body(t, { app, database, mails, transaction })
      await transaction.assertNothingLeft()
    } finally {
      await transaction.rollback()
    }
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

appTest('airports are found by code, by city and by name', async (t, { app }) => {
  const search = async (q: string) =>
    (await app.inject({ url: '/airports', query: { q } })).json().airports.map(({ iata }: { iata: string }) => iata)
  t.equal((await search('lhr'))[0], 'LHR')
  t.has(await search('London'), ['YXU', 'LCY', 'LGW', 'LHR', 'LTN', 'STN'], 'the cities of that name come first')
  t.same(await search('Heathrow'), ['LHR'])
  t.same(await search('%'), [], 'a wildcard is a character like any other')
  t.same((await app.inject('/airports?q=a&limit=3')).json().airports.length, 3)
})

appTest(
  'a trip of several legs is booked, read, and confirmed by mail',
  async (t, { app, database, mails, transaction }) => {
    await leave(database, 5)
    const answer = await bookTrip(app, { ...ada, legs: [there, onwards] })
    t.equal(answer.statusCode, 201)
    const trip = answer.json()
    t.match(trip, { ...ada, status: 'booked', legs: [there, onwards], skipped: [] })
    t.equal(answer.headers.location, `/trips/${trip.id}`)
    t.equal(await seatsLeft(database), 4)
    const { skipped, ...kept } = trip
    t.same((await app.inject(`/trips/${trip.id}`)).json(), kept)
    t.same(mails, [], 'not before the commit is certain')
    await transaction.runCallbacks()
    t.same(mails, [{ to: 'ada@example.org', subject: `Your trip ${trip.id} is booked` }])
  },
)

appTest('an optional leg that is sold out is left out, and the rest of the trip stands', async (t, stage) => {
  const { app, database } = stage
  await leave(database, 0, onwards)
  await leave(database, 5)
  const back = { from: 'JFK', to: 'LHR' }
  const answer = await bookTrip(app, { ...ada, legs: [there, { ...onwards, optional: true }, back] })
  t.equal(answer.statusCode, 201)
  t.match(answer.json(), { legs: [there, back], skipped: [onwards] })
  t.equal(await seatsLeft(database), 4)
  t.equal(await seatsLeft(database, onwards), 0)
})

appTest('a required leg that is sold out fails the whole trip, and no mail is sent', async (t, stage) => {
  const { app, database, mails, transaction } = stage
  await leave(database, 0, onwards)
  await leave(database, 5)
  const answer = await bookTrip(app, { ...ada, legs: [there, onwards] })
  t.equal(answer.statusCode, 409)
  t.match(answer.json(), { error: 'Conflict', message: 'The flight from JFK to ACK is sold out' })
  t.same(await database.rows('trips'), [])
  t.equal(await seatsLeft(database), 5, 'the seat of the other leg is free again')
  await bookTrip(app, { ...ada, legs: [there] })
  await transaction.runCallbacks()
  t.equal(mails.length, 1, 'the mail of a trip that was booked after it')
})

appTest('a trip of which every leg was optional and is sold out is none', async (t, { app, database }) => {
  await leave(database, 0)
  const answer = await bookTrip(app, { ...ada, legs: [{ ...there, optional: true }] })
  t.equal(answer.statusCode, 409)
  t.same(await database.rows('trips'), [])
})

appTest('a cancelled trip gives its seats back, once', async (t, { app, database }) => {
  await leave(database, 5)
  const { id } = (await bookTrip(app, { ...ada, legs: [there, there] })).json()
  t.equal(await seatsLeft(database), 3)
  for (const _ of [1, 2]) {
    const answer = await app.inject({ method: 'DELETE', url: `/trips/${id}` })
    t.equal(answer.statusCode, 200)
    t.equal(answer.json().status, 'cancelled')
    t.equal(await seatsLeft(database), 5)
  }
})

appTest('pages follow one another, the latest trip first', async (t, { app, database }) => {
  await database.query(
    `insert into trips (passenger, email) select 'No ' || n, 'x@example.org' from generate_series(1, 5) n`,
  )
  const seen: string[] = []
  let url: string | null = '/trips?limit=2'
  for (let pages = 0; url && pages < 5; pages++) {
    const { trips, next }: { trips: { passenger: string }[]; next: string | null } = (await app.inject(url)).json()
    t.ok(trips.length <= 2)
    seen.push(...trips.map(({ passenger }) => passenger))
    url = next
  }
  t.same(seen, ['No 5', 'No 4', 'No 3', 'No 2', 'No 1'])
  t.equal(url, null)
})

appTest('all trips are exported, as CSV or as NDJSON', async (t, { app, database }) => {
  await bookTrip(app, { ...ada, passenger: 'Lovelace, "Ada"', legs: [there, onwards] })
  await bookTrip(app, { ...ada, passenger: '=1+1', legs: [there] })
  const csv = await app.inject('/trips/export')
  t.match(csv.headers['content-type'], 'text/csv')
  const [head, first, second, end] = csv.body.split('\r\n')
  t.equal(head, 'id,passenger,email,status,bookedAt,legs')
  t.match(first, /^\d+,"Lovelace, ""Ada""",ada@example\.org,booked,\d{4}-.*Z,LHR-JFK JFK-ACK$/)
  t.match(second, /^\d+,'=1\+1,/)
  t.equal(end, '')

  await database.query(
    `insert into trips (passenger, email) select 'No ' || n, 'x@example.org' from generate_series(1, 999) n`,
  )
  const lines = (await app.inject('/trips/export?format=ndjson')).body.trimEnd().split('\n')
  t.equal(lines.length, 1001)
  t.match(JSON.parse(lines[0] ?? ''), { legs: [there, onwards] })
})

appTest('bad input is answered with 400 and what is wrong with it', async (t, { app, database }) => {
  const trip = { ...ada, legs: [there] }
  const bad: [method: 'GET' | 'POST' | 'DELETE', url: string, body: object | undefined, message: RegExp][] = [
    ['GET', '/airports', undefined, /querystring must have required property 'q'/],
    ['GET', '/airports?q=', undefined, /querystring\/q must match pattern/],
    ['GET', '/airports?q=a%00', undefined, /querystring\/q must match pattern/],
    ['GET', '/airports?q=a&limit=0', undefined, /querystring\/limit must be >= 1/],
    ['GET', '/airports?query=a&q=b', undefined, /querystring must NOT have additional properties/],
    ['GET', '/trips/one', undefined, /params\/id must be integer/],
    ['GET', '/trips/2147483648', undefined, /params\/id must be <= 2147483647/],
    ['DELETE', '/trips/0', undefined, /params\/id must be >= 1/],
    ['GET', '/trips?before=x', undefined, /querystring\/before must be integer/],
    ['GET', '/trips/export?format=xml', undefined, /querystring\/format must be equal to one of the allowed values/],
    ['POST', '/trips', undefined, /body must be object/],
    ['POST', '/trips', { ...trip, passenger: undefined }, /body must have required property 'passenger'/],
    ['POST', '/trips', { ...trip, passenger: 'a\u0000' }, /body\/passenger must match pattern/],
    ['POST', '/trips', { ...trip, email: 'nobody' }, /body\/email must match format "email"/],
    ['POST', '/trips', { ...trip, legs: [] }, /body\/legs must NOT have fewer than 1 items/],
    ['POST', '/trips', { ...trip, legs: [{ from: 'LHR' }] }, /body\/legs\/0 must have required property 'to'/],
    ['POST', '/trips', { ...trip, legs: [{ ...there, from: 'lhr' }] }, /body\/legs\/0\/from must match pattern/],
    ['POST', '/trips', { ...trip, note: 'x' }, /body must NOT have additional properties/],
  ]
  for (const [method, url, body, message] of bad) {
    const answer = await app.inject({ method, url, ...(body && { payload: body }) })
    t.equal(answer.statusCode, 400, `${method} ${url}`)
    t.match(answer.json().message, message)
  }
  t.same(await database.rows('trips'), [])
})

appTest('what is not there is answered with 404 or 422', async (t, { app }) => {
  for (const method of ['GET', 'DELETE'] as const) {
    const answer = await app.inject({ method, url: '/trips/7' })
    t.same(answer.json(), { statusCode: 404, error: 'Not Found', message: 'There is no trip 7' })
  }
  t.equal((await app.inject('/nowhere')).statusCode, 404)
  const answer = await bookTrip(app, { ...ada, legs: [{ from: 'LHR', to: 'XXX', optional: true }] })
  t.equal(answer.statusCode, 422)
  t.equal(answer.json().message, 'There is no flight from LHR to XXX')
})

appTest('what PostgreSQL says of our tables does not reach the client', async (t, { app, database }) => {
  await database.query('alter table trips rename to voyages')
  const answer = await app.inject('/trips')
  t.equal(answer.statusCode, 500)
  t.same(answer.json().message, 'Something went wrong here')
})
