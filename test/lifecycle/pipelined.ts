import { buildApp } from '../support/app.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn } from '../support/notebook.ts'
import { allHaveLeft } from '../support/open-sockets.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/* Several requests on one socket at once: Node tells nothing of those behind the first when the socket dies. */
const database = await createDatabase(t, { sql: NOTES })

inBothModes(database, 'pipelined requests are answered in order and all are kept', async (t, commitOn) => {
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.post<{ Body: { note: string } }>('/', async (request) => {
      await add(request.db, request.body.note)
      return request.body.note
    })
  })
  const client = await openHttp(t, app)
  for (const note of ['1', '2', '3']) client.send('POST', '/', { body: { note } })
  for (const note of ['1', '2', '3']) t.equal((await client.response()).body, note)
  await eventually(async () => (await notesIn(database)).length === 3)
})

for (const how of ['destroy', 'reset', 'halfClose'] as const) {
  inBothModes(database, `the socket dies (${how}) under handlers at work`, async (t, commitOn) => {
    const goOn = gate()
    const late: string[] = []
    const app = await buildApp(t, database, { commitOn, pool: { size: 4 } }, (app) => {
      app.route<{ Querystring: { note: string } }>({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          await add(request.db, request.query.note)
          await goOn.opened
          await add(request.db, 'late').catch((error) => late.push(error.code))
          return 'ok'
        },
      })
    })
    const client = await openHttp(t, app)
    client
      .send('GET', '/?note=1')
      .send('GET', '/?note=2')
      .send('POST', '/?note=3', { body: { note: 'x' } })
    await eventually(() => app.db.snapshot().holders.filter(({ statements }) => statements === 1).length === 3)
    client[how]()
    await eventually(() => app.db.snapshot().checkedOut === 0, { withinMillis: 1000 })
    goOn.open()
    await eventually(() => late.length === 3)
    t.strictSame(new Set(late), new Set(['FST_REQUEST_DB_SESSION_ENDED']))
    await holds(t, database, [])
    t.equal(app.db.snapshot().totals.checkouts, 3)
  })

  inBothModes(database, `the socket dies (${how}) before the second request's first use`, async (t, commitOn) => {
    const goOn = gate()
    const arrived: string[] = []
    const refused: string[] = []
    const app = await buildApp(t, database, { commitOn }, (app) => {
      app.route({
        method: ['GET', 'POST'],
        url: '/',
        handler: async (request) => {
          arrived.push(request.method)
          await goOn.opened
          await add(request.db, 'x').catch((error) => refused.push(error.code))
          return 'ok'
        },
      })
    })
    const client = await openHttp(t, app)
    client
      .send('GET', '/')
      .send('GET', '/')
      .send('POST', '/', { body: { note: 'x' } })
    await eventually(() => arrived.length === 3)
    client[how]()
    await allHaveLeft(app)
    goOn.open()
    await eventually(() => refused.length === 3)
    t.strictSame(new Set(refused), new Set(['FST_REQUEST_DB_SESSION_ENDED']))
    await holds(t, database, [])
    t.equal(app.db.snapshot().totals.checkouts, 0)
  })
}

inBothModes(database, 'the socket dies when the second answer waits behind the first', async (t, commitOn) => {
  const goOn = gate()
  const answered: string[] = []
  const app = await buildApp(t, database, { commitOn }, (app) => {
    app.get('/first', async () => {
      await goOn.opened
      return 'ok'
    })
    app.route({
      method: ['GET', 'POST'],
      url: '/',
      // Runs when the answer has been written; it cannot leave yet.
      handler: async (request, reply) => {
        await add(request.db, request.method)
        const { end } = reply.raw
        reply.raw.end = ((...rest: Parameters<typeof end>) => {
          answered.push(request.method)
          return end.apply(reply.raw, rest)
        }) as typeof end
        return 'ok'
      },
    })
  })
  const client = await openHttp(t, app)
  client
    .send('GET', '/first')
    .send('GET', '/')
    .send('POST', '/', { body: { note: 'x' } })
  await eventually(() => answered.length === 2)
  client.destroy()
  // The answer was ready: in the one mode COMMIT was sent by then, in the other it waits for the answer to leave.
  if (commitOn === 'onSend') t.strictSame((await notesIn(database)).sort(), ['GET', 'POST'])
  else await holds(t, database, [])
  goOn.open()
})
