import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { buildApp } from '../../example-app/app.ts'
import type { Mail } from '../../example-app/mailer.ts'
import { worker } from '../../example-app/worker.ts'
import { createDatabase, type Database } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'

/* The queue of mails: written with what they tell, sent by a worker that takes rows nobody else has. */

const WITHIN = { withinMillis: 20_000 }

async function startApp(t: Test, database: Database, send: (mail: Mail) => Promise<void>): Promise<FastifyInstance> {
  const mailer = { send }
  const app = buildApp({ connectionString: database.connectionString, mailer })
  app.register(worker, { mailer })
  t.teardown(() => app.close())
  await app.ready()
  return app
}

async function bookAndCancel(app: FastifyInstance): Promise<void> {
  const payload = { passenger: 'Ada', email: 'ada@example.org', legs: [{ from: 'LHR', to: 'JFK' }] }
  const { id } = (await app.inject({ method: 'POST', url: '/trips', payload })).json()
  await app.inject({ method: 'DELETE', url: `/trips/${id}` })
}

const isCancellation = ({ subject }: Mail) => subject.endsWith('is cancelled')

t.test('a cancelled trip is told by a mail, once, and its job is gone', async (t) => {
  const database = await createDatabase(t)
  const mails: Mail[] = []
  const app = await startApp(t, database, async (mail) => void mails.push(mail))
  await bookAndCancel(app)
  await eventually(() => mails.some(isCancellation), WITHIN)
  await eventually(async () => (await database.rows('jobs')).length === 0, WITHIN)
  t.strictSame(mails.filter(isCancellation), [{ to: 'ada@example.org', subject: 'Your trip 1 is cancelled' }])
  t.match(await database.rows('audit'), [{ what: 'trip 1 cancelled' }])
})

t.test('a mail that cannot be sent is tried again later, and its job is there meanwhile', async (t) => {
  const database = await createDatabase(t)
  let sent = 0
  const app = await startApp(t, database, async (mail) => {
    if (isCancellation(mail) && ++sent === 1) throw new Error('the mail server is down')
  })
  await bookAndCancel(app)
  await eventually(async () => (await database.rows<{ attempts: number }>('jobs'))[0]?.attempts === 1, WITHIN)
  await eventually(() => sent === 2, WITHIN)
  await eventually(async () => (await database.rows('jobs')).length === 0, WITHIN)
})

t.test('two workers never do the same job, and both work', async (t) => {
  const database = await createDatabase(t)
  const done: string[] = []
  const bothSend = gate()
  const sending = new Set<string>()
  const sendAs = (who: string) => async (mail: Mail) => {
    sending.add(who)
    if (sending.size === 2) bothSend.open()
    await bothSend.opened
    done.push(mail.subject)
  }
  const [first] = await Promise.all([startApp(t, database, sendAs('a')), startApp(t, database, sendAs('b'))])
  const subjects = Array.from({ length: 10 }, (_, index) => `mail ${index}`)
  await first.db.session(async (db) => {
    const jobs = subjects.map((subject) => ({ mail: JSON.stringify({ to: 'x@example.org', subject }) }))
    await db.insertInto('jobs').values(jobs).execute()
  })
  await eventually(() => done.length === 10, WITHIN)
  await eventually(async () => (await database.rows('jobs')).length === 0, WITHIN)
  t.strictSame(done.sort(), subjects)
})

t.test('an app that is closed while a mail is sent gives the job back', async (t) => {
  const database = await createDatabase(t)
  const sending = gate()
  const app = await startApp(t, database, async () => {
    sending.open()
    await new Promise(() => {})
  })
  await app.db.session((db) =>
    db
      .insertInto('jobs')
      .values({ mail: JSON.stringify({ to: 'x', subject: 'y' }) })
      .execute(),
  )
  await sending.opened
  await app.close()
  t.match(await database.rows('jobs'), [{ attempts: 0 }])
  t.equal((await database.backends()).length, 0)
})
