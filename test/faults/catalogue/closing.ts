import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { sql } from 'kysely'
import type { CommitOn } from '../../../lib/index.ts'
import { createDatabase, type Database } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { HttpClient, openHttp } from '../../support/http-client.ts'
import { inBothModes } from '../../support/modes.ts'
import { add, notesIn } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { type Ending, type Scene, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { ownServer } from '../../support/server.ts'
import { type Test, t } from '../../support/test.ts'

/* The end of the app, in whatever state it is. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, { sql: NOTES })

/** Writes `a`, waits for `goOn`, writes `b`. */
const inTwoParts = (scene: Scene): SceneOptions => ({
  pool: { size: 1 },
  handler: async (db) => {
    await add(db, 'a')
    scene.reached.open(1)
    await scene.goOn.opened
    await add(db, 'b')
    return 'done'
  },
})

scenario(database, '93 a request in flight is finished, the next on its socket is turned away', async (scene) => {
  await scene.open(inTwoParts(scene))
  const client = (await openHttp(scene.t, scene.app)).send('POST', '/')
  await scene.reached.opened
  const closed = scene.app.close()
  client.send('POST', '/')
  scene.goOn.open()
  const statuses = [(await client.response()).status, (await client.response()).status]
  await closed
  const answers = statuses.map((status) => ({ status, code: undefined, body: '' }))
  return { answers, expected: [200, 503], rows: ['a', 'b'], next: 'closed' }
})

scenario(database, '94 an injection is in flight beyond the grace', async (scene) => {
  await scene.open({ ...inTwoParts(scene), closeGraceMillis: 50 })
  const answer = scene.post()
  await scene.reached.opened
  await scene.app.close()
  scene.goOn.open()
  return { answers: [await answer], expected: ['503 POOL_CLOSED'], rows: [], next: 'closed' }
})

scenario(database, '94 the client is gone, and its handler goes on', async (scene) => {
  await scene.open(inTwoParts(scene))
  const client = (await openHttp(scene.t, scene.app)).send('POST', '/')
  await scene.reached.opened
  client.destroy()
  await scene.app.close()
  scene.goOn.open()
  return { answers: [], expected: [], rows: [], next: 'closed' }
})

/** What an app is in the middle of when it is closed; resolves with what its clients will be told. */
const STATES: Record<string, (scene: Scene) => Promise<() => Promise<Pick<Ending, 'answers' | 'expected' | 'rows'>>>> =
  {
    'nothing was ever sent': async (scene) => {
      await scene.open({ isOpen: false })
      return async () => ({ answers: [], expected: [], rows: [] })
    },
    'connections are idle': async (scene) => {
      await scene.open({ pool: { size: 3 }, handler: writes('kept') })
      const answers = await Promise.all([1, 2, 3].map(() => scene.post()))
      return async () => ({ answers, expected: [200, 200, 200], rows: ['kept', 'kept', 'kept'] })
    },
    'a connect has failed': async (scene) => {
      await scene.open({ isOpen: false, handler: writes('lost') })
      await scene.proxy.refuse()
      const answers = [await scene.post()]
      return async () => ({ answers, expected: ['503 UNAVAILABLE'], rows: [] })
    },
    'a connection is being opened': async (scene) => {
      await scene.open({ isOpen: false, handler: writes('lost') })
      scene.proxy.silenceStartup()
      const answer = scene.post()
      await eventually(() => scene.proxy.recordings.length === 1)
      return async () => ({ answers: [await answer], expected: ['503 POOL_CLOSED'], rows: [] })
    },
    'one waits behind a holder': async (scene) => {
      await scene.open(inTwoParts(scene))
      const holder = scene.post()
      await scene.reached.opened
      const waiter = scene.post()
      await eventually(() => scene.app.db.snapshot().waiting === 1)
      setImmediate(() => scene.goOn.open())
      return async () => ({
        answers: [await holder, await waiter],
        expected: [200, '503 POOL_CLOSED'],
        rows: ['a', 'b'],
      })
    },
    'a stream is under way': async (scene) => {
      await scene.open({
        handler: async (db) => {
          await add(db, 'streamed')
          const rows = async function* () {
            yield 'first\n'
            scene.reached.open(1)
            await scene.goOn.opened
            for await (const { note } of db.selectFrom('notes').select('note').stream()) yield note
          }
          return Readable.from(rows())
        },
      })
      const answer = scene.post()
      await scene.reached.opened
      setImmediate(() => scene.goOn.open())
      return async () => ({ answers: [await answer], expected: [200], rows: ['streamed'] })
    },
    'a session outside of a request is at work': async (scene) => {
      await scene.open()
      const session = scene.app.db.session(async (db) => {
        await add(db, 'a')
        scene.reached.open(1)
        await scene.goOn.opened
        await add(db, 'b')
      })
      await scene.reached.opened
      setImmediate(() => scene.goOn.open())
      return async () => {
        await session
        return { answers: [], expected: [], rows: ['a', 'b'] }
      }
    },
    'forceCloseConnections cuts the client': async (scene) => {
      await scene.open({ ...inTwoParts(scene), fastify: { forceCloseConnections: true } })
      const guest = await scene.guest()
      guest.send('POST', '/')
      await scene.reached.opened
      return async () => {
        scene.goOn.open()
        return { answers: [await guest.answer()], expected: ['none'], rows: [] }
      }
    },
    'the network is gone under a statement': async (scene) => {
      await scene.open({
        closeGraceMillis: 100,
        settleTimeoutMillis: 300,
        handler: async (db) => {
          await add(db, 'lost')
          scene.proxy.swallow({ sockets: 'all' })
          scene.reached.open(1)
          await sql`select 1`.execute(db)
        },
      })
      const answer = scene.post()
      await scene.reached.opened
      return async () => {
        const { status } = await answer
        scene.t.ok(status >= 500, `it is told ${status}`)
        // The server has never heard of the end, until the proxy says so.
        scene.proxy.cut('reset')
        return { answers: [], expected: [], rows: [] }
      }
    },
  }

for (const [state, enter] of Object.entries(STATES)) {
  scenario(database, `95 close(), and again, while ${state}`, async (scene) => {
    const leave = await enter(scene)
    const since = performance.now()
    await Promise.all([scene.app.close(), scene.app.close()])
    await scene.app.close()
    scene.t.ok(performance.now() - since < 5000, `closed after ${Math.round(performance.now() - since)} ms`)
    return { ...(await leave()), next: 'closed' }
  })
}

scenario(database, '96 hooks of onClose that use the database', async (scene) => {
  const app = await scene.open({
    routes: (app) => {
      app.addHook(
        'onClose',
        () => app.db.session((db) => add(db, 'after the plugin')) as Promise<unknown> as Promise<void>,
      )
      app.register(async (child) => {
        child.addHook('onClose', () => app.db.session((db) => add(db, 'child')) as Promise<unknown> as Promise<void>)
      })
    },
  })
  await app.close()
  return { answers: [], expected: [], rows: ['child', 'after the plugin'], next: 'closed' }
})

const SCRIPT = fileURLToPath(new URL('../../fixtures/sigterm-app.ts', import.meta.url))
const CLIENTS = 50

// A server of its own, since it is frozen.
const server = await ownServer(t)
const fragile = await createDatabase(t, { sql: NOTES, server })

for (const [number, trouble] of [
  ['97', 'healthy'],
  ['97', 'frozen'],
  ['29', 'unreachable'],
] as const) {
  inBothModes(fragile, `${number} SIGTERM under load, and the server is ${trouble}`, async (t, commitOn) => {
    const proxy = await startProxy(t, fragile.connectionString)
    const { child, port } = await startApp(t, proxy.connectionString, commitOn)
    const told = await underLoad(t, port, async () => {
      if (trouble === 'frozen') await freeze(t, fragile)
      if (trouble === 'unreachable') proxy.swallow({ sockets: 'all', passesClose: false })
      const since = performance.now()
      const exited = once(child, 'exit')
      child.kill('SIGTERM')
      t.strictSame(await exited, [0, null], 'it ends by itself')
      t.ok(performance.now() - since < 10_000, `after ${Math.round(performance.now() - since)} ms`)
    })
    for (const pid of frozen.splice(0)) process.kill(pid, 'SIGCONT')
    proxy.cut('reset')
    await eventually(async () => (await fragile.backends()).length === 0, { withinMillis: 10_000 })
    const kept = new Set(await notesIn(fragile))
    // In `onResponse` an answer may be out before its COMMIT reaches a server that has vanished.
    const lost = commitOn === 'onSend' || trouble === 'healthy' ? told.kept.filter((note) => !kept.has(note)) : []
    t.strictSame(lost, [], `all of ${told.kept.length} acknowledged writes are kept`)
    t.strictSame(
      told.refused.filter((note) => kept.has(note)),
      [],
      `none of ${told.refused.length} refused ones is`,
    )
  })
}

const frozen: number[] = []

/** Stops all backends of a database as they are; the kernel still takes what is sent to them. */
async function freeze(t: Test, database: Database): Promise<void> {
  for (const { pid } of await database.backends()) {
    process.kill(pid, 'SIGSTOP')
    frozen.push(pid)
  }
  t.teardown(() => {
    for (const pid of frozen.splice(0)) process.kill(pid, 'SIGCONT')
  })
}

async function startApp(t: Test, connectionString: string, commitOn: CommitOn) {
  const options = { connectionString, commitOn, pool: { size: 4 }, closeGraceMillis: 3000, settleTimeoutMillis: 1000 }
  const child: ChildProcess = spawn(process.execPath, ['--import=tsx', SCRIPT, JSON.stringify(options)], {
    stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
  })
  t.teardown(() => child.kill('SIGKILL'))
  const [{ port }] = (await once(child, 'message')) as [{ port: number }]
  return { child, port }
}

/** Clients that send the next as soon as they have the answer to the last, until there is nobody to send to. */
async function underLoad(t: Test, port: number, then: () => Promise<void>) {
  const told = { kept: [] as string[], refused: [] as string[] }
  const one = async (client: number) => {
    const connection = new HttpClient(port)
    t.teardown(() => connection.destroy())
    for (let n = 0; ; n++) {
      const note = `${client}-${n}`
      const answer = await connection
        .send('POST', `/${note}`)
        .response(60_000)
        .catch(() => undefined)
      if (answer?.status === 201) told.kept.push(note)
      // What COMMIT_UNKNOWN says of the rows is in its name.
      else if (answer !== undefined && !answer.body.includes('COMMIT_UNKNOWN')) told.refused.push(note)
      if (answer?.status !== 201) return connection.destroy()
    }
  }
  const clients = Array.from({ length: CLIENTS }, (_, client) => one(client))
  await eventually(() => told.kept.length > 200, { withinMillis: 30_000 })
  await then()
  await Promise.all(clients)
  return told
}
