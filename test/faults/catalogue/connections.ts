import { sql } from 'kysely'
import { takeClock } from '../../support/clock.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { add, notesIn, pidOf, terminate } from '../../support/notebook.ts'
import { scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { ownServer } from '../../support/server.ts'
import { t } from '../../support/test.ts'

/* Connections that die. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, { sql: NOTES })
const LOST = '503 CONNECTION_LOST'

scenario(database, '20 the backend is killed between two statements', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      await terminate(database, await pidOf(db))
      await add(db, 'lost too')
    },
  })
  return { answers: [await scene.post()], expected: [LOST], rows: [], connection: 'gone', totals: { invalidated: 1 } }
})

scenario(database, '21 idle backends are killed', async (scene) => {
  await scene.open({ pool: { size: 3 }, handler: writes('kept') })
  await Promise.all([1, 2, 3].map(() => scene.app.inject('/ordinary')))
  for (const { pid } of await scene.backends()) await terminate(database, pid)
  const answers = [await scene.post()]
  return { answers, expected: [200], rows: ['kept'], connection: 'gone' }
})

scenario(database, '22 the backend is killed during a statement', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      scene.reached.open(await pidOf(db))
      await sql`select pg_sleep(60)`.execute(db)
    },
  })
  const answer = scene.post()
  const pid = await scene.reached.opened
  await eventually(async () => (await scene.backends()).some(({ query }) => query.includes('pg_sleep(60)')))
  scene.proxy.clear()
  await terminate(database, pid)
  const answers = [await answer]
  scene.t.strictSame(scene.proxy.statements(), [], 'nothing is sent on the dead connection')
  return { answers, expected: [LOST], rows: [], connection: 'gone', totals: { invalidated: 1 } }
})

scenario(database, '23 the handler catches the loss and goes on', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      await terminate(database, await pidOf(db))
      const caught: unknown[] = []
      for (const note of ['lost too', 'and this']) await add(db, note).catch((error) => caught.push(error.code))
      scene.t.strictSame(caught, ['FST_REQUEST_DB_CONNECTION_LOST', 'FST_REQUEST_DB_CONNECTION_LOST'])
      return 'as if nothing had been'
    },
  })
  return { answers: [await scene.post()], expected: [LOST], rows: [], connection: 'gone', totals: { commits: 0 } }
})

for (const setting of ['idle_in_transaction_session_timeout', 'transaction_timeout']) {
  scenario(database, `24 ${setting} ends the transaction while the handler is elsewhere`, async (scene) => {
    await scene.open({
      handler: async (db) => {
        await sql`select set_config(${setting}, '100', true)`.execute(db)
        await add(db, 'lost')
        // Not only that the backend is gone, but that the news has come.
        await eventually(() => scene.app.db.snapshot().totals.invalidated === 1)
      },
    })
    return { answers: [await scene.post()], expected: [LOST], rows: [], connection: 'gone' }
  })
}

scenario(database, '26 the ping of a half-open connection', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open({ pool: { prePing: { timeoutMillis: 200 } }, handler: writes('kept') })
  scene.proxy.swallow({ sockets: 'open' })
  clock.advance(5000)
  return { answers: [await scene.post()], expected: [200], rows: ['kept'], totals: { failedPings: 1, invalidated: 1 } }
})

for (const [end, answers] of [
  ['COMMIT', { onSend: '500 COMMIT_UNKNOWN', onResponse: 200 }],
  ['ROLLBACK', { onSend: '500 MINE', onResponse: '500 MINE' }],
] as const) {
  scenario(database, `28 the network is gone at ${end}`, async (scene) => {
    await scene.open({
      settleTimeoutMillis: 300,
      handler: async (db) => {
        await add(db, 'lost')
        scene.proxy.swallow({ sockets: 'open' })
        if (end === 'ROLLBACK') throw Object.assign(new Error('mine'), { code: 'MINE' })
        return 'done'
      },
    })
    const told = [await scene.post()]
    return { answers: told, expected: [answers[scene.commitOn]], rows: [], totals: { invalidated: 1 } }
  })
}

scenario(database, '30 a server that accepts and says nothing', async (scene) => {
  const connection = { connectionString: scene.proxy.connectionString, connectionTimeoutMillis: 200 }
  await scene.open({ connection, isOpen: false, handler: writes('no') })
  scene.proxy.silenceStartup()
  const answers = [await scene.post()]
  scene.t.match(scene.app.db.snapshot(), { open: 0, totals: { failedConnects: 1 } })
  return { answers, expected: ['503 UNAVAILABLE'], rows: [] }
})

scenario(database, '31 a slow server is not a dead one', async (scene) => {
  const clock = takeClock(scene.t)
  await scene.open({ handler: writes('kept') })
  scene.proxy.delay(120)
  clock.advance(5000)
  const answers = [await scene.post()]
  await eventually(async () => (await notesIn(database)).length === 1)
  return { answers, expected: [200], rows: ['kept'], connection: 'reused', totals: { failedPings: 0, invalidated: 0 } }
})

for (const swallows of [false, true]) {
  scenario(database, `32 statement_timeout${swallows ? ', swallowed' : ''}`, async (scene) => {
    await scene.open({
      statementTimeoutMillis: 100,
      handler: async (db) => {
        await add(db, 'lost')
        const slow = sql`select pg_sleep(60)`.execute(db)
        await (swallows ? slow.catch(() => {}) : slow)
        return 'done'
      },
    })
    const expected = [swallows ? '500 TRANSACTION_ABORTED' : '500 57014']
    return { answers: [await scene.post()], expected, rows: [], connection: 'reused', totals: { invalidated: 0 } }
  })
}

for (const how of ['end', 'reset'] as const) {
  scenario(database, `33 BEGIN meets a connection that is closed by ${how}`, async (scene) => {
    await scene.open({ handler: writes('kept') })
    scene.proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, how)
    const answers = [await scene.post()]
    return { answers, expected: [200], rows: ['kept'], connection: 'gone', totals: { replays: 1, invalidated: 1 } }
  })
}

// A server of its own, since it is taken down.
const server = await ownServer(t)
const fragile = await createDatabase(t, { sql: NOTES, server })

scenario(fragile, '25 the server restarts under five idle connections', async (scene) => {
  const clock = takeClock(scene.t)
  const seen = new Set<number>()
  await scene.open({ pool: { size: 5 }, handler: async (db) => void seen.add(await pidOf(db)) })
  await Promise.all([1, 2, 3, 4, 5].map(() => scene.post()))
  const before = [...seen]
  await server.restart()
  clock.advance(5000)
  seen.clear()
  const answers = await Promise.all([1, 2, 3, 4, 5].map(() => scene.post()))
  scene.t.strictSame(
    before.filter((pid) => seen.has(pid)),
    [],
    'none of them is used again',
  )
  return { answers, expected: [200, 200, 200, 200, 200], rows: [] }
})
