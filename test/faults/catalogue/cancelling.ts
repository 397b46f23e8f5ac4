import { sql } from 'kysely'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { add, pidOf } from '../../support/notebook.ts'
import { PROTOCOLS, type Protocol, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* Clients that leave, and time that is up. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, {
  sql: `${NOTES}; create table locks (id int primary key, n int not null); insert into locks values (1, 0)`,
})

/** What a reset over HTTP/2 needs. */
const speaking = (protocol: Protocol): Pick<SceneOptions, 'fastify'> =>
  protocol === 'HTTP/2' ? { fastify: { http2: true } } : {}

for (const protocol of PROTOCOLS) {
  scenario(database, `52 the client leaves during a statement that holds a lock, over ${protocol}`, async (scene) => {
    await scene.open({
      ...speaking(protocol),
      handler: async (db) => {
        await add(db, 'lost')
        await sql`update locks set n = n + 1`.execute(db)
        scene.reached.open(await pidOf(db))
        await sql`select pg_sleep(60)`.execute(db)
      },
    })
    const guest = await scene.guest(protocol)
    guest.send('POST', '/', {})
    const pid = await scene.reached.opened
    await eventually(async () => (await scene.backends()).some(({ query }) => query.includes('pg_sleep(60)')))
    const since = performance.now()
    guest.leave()
    await database.query('select n from locks for update')
    scene.t.ok(performance.now() - since < 2000, `the lock is free after ${Math.round(performance.now() - since)} ms`)
    await eventually(async () => (await scene.backends()).every((one) => one.pid !== pid || one.state === 'idle'))
    return { answers: [], expected: [], rows: [], totals: { cancels: 1, commits: 0 } }
  })

  scenario(database, `53 the client leaves while it is queued, over ${protocol}`, async (scene) => {
    await scene.open({
      ...speaking(protocol),
      pool: { size: 1 },
      handler: writes('lost'),
      routes: (app) => {
        app.post('/hold', async ({ db }) => {
          await add(db, 'held')
          scene.reached.open(1)
          await scene.goOn.opened
          return 'held'
        })
      },
    })
    const holder = scene.post('/hold')
    await scene.reached.opened
    const guest = await scene.guest(protocol)
    guest.send('POST', '/', {})
    await eventually(() => scene.app.db.snapshot().waiting === 1)
    guest.leave()
    await eventually(() => scene.app.db.snapshot().waiting === 0)
    scene.goOn.open()
    const totals = { checkouts: 1, timeouts: 0 }
    return { answers: [await holder], expected: [200], rows: ['held'], connection: 'reused', totals }
  })

  scenario(database, `55 the client of a POST leaves while the handler works, over ${protocol}`, async (scene) => {
    const late = gate<unknown>()
    await scene.open({
      ...speaking(protocol),
      handler: async (db) => {
        await add(db, 'lost')
        scene.reached.open(1)
        await scene.goOn.opened
        await add(db, 'lost too').catch(late.open)
        return 'done'
      },
    })
    const guest = await scene.guest(protocol)
    guest.send('POST', '/', { a: 1 })
    await scene.reached.opened
    guest.leave()
    await eventually(() => scene.app.db.snapshot().checkedOut === 0)
    scene.goOn.open()
    scene.t.match(await late.opened, { code: 'FST_REQUEST_DB_SESSION_ENDED' })
    return { answers: [], expected: [], rows: [], connection: 'reused', totals: { checkouts: 1, commits: 0 } }
  })

  scenario(database, `56 the client leaves before the handler begins, over ${protocol}`, async (scene) => {
    const late = gate<unknown>()
    await scene.open({
      ...speaking(protocol),
      routes: (app) => {
        const preHandler = async () => {
          scene.reached.open(1)
          await scene.goOn.opened
        }
        app.post('/late', { preHandler }, async ({ db }) => {
          await add(db, 'lost').catch(late.open)
          return 'done'
        })
      },
    })
    const left = gate()
    scene.app.server.once('connection', (socket: { once(event: 'close', listener: () => void): void }) =>
      socket.once('close', () => left.open()),
    )
    const guest = await scene.guest(protocol)
    guest.send('POST', '/late', {})
    await scene.reached.opened
    guest.leave()
    // A reset of HTTP/2 closes no socket: it is there before what is asked behind it.
    if (protocol !== 'HTTP/2') await left.opened
    else {
      guest.send('GET', '/is-served')
      await guest.answer()
    }
    scene.goOn.open()
    scene.t.match(await late.opened, { code: 'FST_REQUEST_DB_SESSION_ENDED' })
    return { answers: [], expected: [], rows: [], totals: { checkouts: 0 } }
  })
}

scenario(database, '54 the client leaves while its connection is opened', async (scene) => {
  await scene.open({ isOpen: false, handler: writes('lost') })
  const welcome = scene.proxy.trap({ from: 'server', type: 'R' }, 'hold')
  const guest = await scene.guest()
  guest.send('POST', '/')
  await welcome.sprung
  guest.leave()
  await eventually(() => scene.app.db.snapshot().waiters.length === 0)
  welcome.release()
  await eventually(() => scene.app.db.snapshot().idle === 1)
  scene.t.strictSame(scene.proxy.statements(), [])
  return { answers: [], expected: [], rows: [], totals: { opened: 1, checkouts: 0 } }
})

scenario(database, '60 an injection is aborted', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      scene.reached.open(1)
      await scene.goOn.opened
      return 'done'
    },
  })
  const abort = new AbortController()
  const answer = scene.app.inject({ method: 'POST', url: '/', signal: abort.signal }).catch(() => 'none' as const)
  await scene.reached.opened
  abort.abort()
  await eventually(() => scene.app.db.snapshot().checkedOut === 0)
  scene.goOn.open()
  const told = (await answer) === 'none' ? (['none'] as const) : []
  return { answers: told, expected: ['none'], rows: [], connection: 'reused', totals: { commits: 0 } }
})

scenario(database, '61 the handler outlives handlerTimeout', async (scene) => {
  const late = gate<unknown>()
  await scene.open({
    routes: (app) => {
      app.get('/slow', { handlerTimeout: 50 }, async ({ db }) => {
        await add(db, 'A')
        await scene.goOn.opened
        await add(db, 'B').catch(late.open)
        return 'done'
      })
    },
  })
  const guest = await scene.guest()
  guest.send('GET', '/slow')
  const answers = [await guest.answer()]
  scene.goOn.open()
  scene.t.match(await late.opened, { code: 'FST_REQUEST_DB_SESSION_ENDED' })
  const expected = ['503 FST_ERR_HANDLER_TIMEOUT']
  return { answers, expected, rows: [], connection: 'reused', totals: { checkouts: 1, commits: 0 } }
})

scenario(database, '62 request.signal of a POST is aborted when its body is read', async (scene) => {
  await scene.open({
    routes: (app) => {
      app.post('/signal', { handlerTimeout: 10_000 }, async ({ db }) => {
        for (let n = 0; n < 3; n++) await add(db, 'kept')
        return 'done'
      })
    },
  })
  const guest = await scene.guest()
  guest.send('POST', '/signal', { a: 1 })
  return { answers: [await guest.answer()], expected: [200], rows: ['kept', 'kept', 'kept'], connection: 'reused' }
})
