import { sql } from 'kysely'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { add, pidOf, terminate } from '../../support/notebook.ts'
import { freeze, RELAY } from '../../support/relay.ts'
import { type Answer, type Scene, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { t } from '../../support/test.ts'

/* Two faults at a time, in a session and at its end. Nobody else's scenarios. */

// The COMMIT of a note that is called 'slow … refused' waits, and then fails.
const database = await createDatabase(t, {
  sql: `${RELAY};
    create function refuse_at_commit() returns trigger language plpgsql as $$
    begin
      if new.note like '%refused' then raise exception 'refused' using errcode = '23514'; end if;
      return null;
    end $$;
    create constraint trigger refuse_at_commit after insert on notes deferrable initially deferred
      for each row execute function refuse_at_commit()`,
})
const LOST = '503 CONNECTION_LOST'

/** `POST /note/:note` writes it. */
const withNotes = (options: SceneOptions = {}): SceneOptions => ({
  pool: { size: 1 },
  ...options,
  routes: (app) => {
    app.post<{ Params: { note: string } }>('/note/:note', ({ db, params }) => writes(params.note)(db))
    return options.routes?.(app)
  },
})
const told = ({ commitOn }: Scene, failure: string | number) => (commitOn === 'onSend' ? failure : 200)
const handedOver = (scene: Scene) => eventually(() => scene.app.db.snapshot().totals.handOvers > 0)

for (const how of ['end', 'reset', 'swallow'] as const) {
  scenario(
    database,
    `the connection is lost (${how}) at the RELEASE of a savepoint whose siblings wait for it`,
    async (scene) => {
      await scene.open(
        withNotes({
          settleTimeoutMillis: 400,
          maxSessionMillis: 1000,
          handler: async (db) => {
            await add(db, 'lost')
            const nested = (note: string) =>
              db.transaction().execute((trx) => trx.insertInto('notes').values({ note }).execute())
            await Promise.allSettled([nested('lost'), add(db, 'lost'), nested('lost'), add(db, 'lost')])
            return 'no success'
          },
        }),
      )
      scene.proxy.trap({ from: 'client', type: 'P', text: 'RELEASE' }, how)
      const answers = [await scene.post(), await scene.post('/note/next')]
      // Cut for its time, it says so in both modes.
      const first = how === 'swallow' ? '500 SESSION_ENDED' : LOST
      return {
        answers,
        expected: [first, 200],
        rows: ['next'],
        connection: 'gone',
        totals: { invalidated: 1, commits: 1 },
      }
    },
  )
}

scenario(database, 'a savepoint is undone, and a sibling that waited for its end fails unheard', async (scene) => {
  await scene.open(
    withNotes({
      handler: async (db) => {
        await add(db, 'lost')
        const nested = db.transaction().execute(async (trx) => {
          await trx.insertInto('notes').values({ note: 'lost' }).execute()
          throw new Error('mine')
        })
        await Promise.allSettled([nested, sql`select 1/0`.execute(db)])
        return 'no success'
      },
    }),
  )
  const answers = [await scene.post(), await scene.post('/note/next')]
  const expected = ['500 TRANSACTION_ABORTED', 200]
  return { answers, expected, rows: ['next'], connection: 'reused', totals: { commits: 1, invalidated: 0 } }
})

scenario(database, 'statement_timeout and the departure of the client meet, again and again', async (scene) => {
  await scene.open(
    withNotes({
      statementTimeoutMillis: 40,
      handler: async (db) => {
        await add(db, 'lost')
        await sql`select pg_sleep(60)`.execute(db)
      },
    }),
  )
  for (let round = 0; round < 20; round++) {
    const guest = await scene.guest()
    guest.send('POST', '/', {})
    await eventually(() => scene.app.db.snapshot().checkedOut === 1)
    await new Promise((resolve) => setTimeout(resolve, 30 + round))
    guest.leave()
    await eventually(() => scene.app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
  }
  return { answers: [await scene.post('/note/next')], expected: [200], rows: ['next'], totals: { commits: 1 } }
})

scenario(database, 'maxSessionMillis and an administrator end the same session, again and again', async (scene) => {
  await scene.open(
    withNotes({
      maxSessionMillis: 40,
      handler: async (db) => {
        await add(db, 'lost')
        const pid = await pidOf(db)
        setTimeout(() => void terminate(database, pid), 36 + (pid % 5))
        await sql`select pg_sleep(60)`.execute(db)
      },
    }),
  )
  const answers: Answer[] = []
  for (let round = 0; round < 12; round++) answers.push(await scene.post())
  const honest = answers.every(({ code }) => /^(SESSION_ENDED|CONNECTION_LOST|57014)$/.test(code ?? ''))
  scene.t.ok(honest, `${answers.map(({ status, code }) => `${status} ${code}`)}`)
  return { answers: [await scene.post('/note/next')], expected: [200], rows: ['next'], totals: { commits: 1 } }
})

scenario(database, 'a COMMIT takes too long for the one behind, and is then refused', async (scene) => {
  await scene.open(withNotes({ pool: { size: 1, timeoutMillis: 300 }, settleTimeoutMillis: 5000 }))
  const { frozen, thaw } = await freeze(scene.t, database)
  const leader = scene.post('/note/slow%20and%20refused')
  await frozen()
  const follower = scene.post('/note/lost')
  await handedOver(scene)
  const overdue = await follower
  const late = scene.post('/note/kept')
  await eventually(() => scene.app.db.snapshot().waiting === 1)
  await thaw()
  const answers = [await leader, overdue, await late]
  const expected = [told(scene, '500 23514'), '503 POOL_TIMEOUT', 200]
  return {
    answers,
    expected,
    rows: ['kept'],
    connection: 'reused',
    totals: { timeouts: 1, commits: 1, failedCommits: 1 },
  }
})

scenario(database, 'the answer to COMMIT is lost, and the client of the one behind has left', async (scene) => {
  await scene.open(withNotes({ settleTimeoutMillis: 5000 }))
  const { frozen, thaw } = await freeze(scene.t, database)
  const leader = scene.post('/note/slow')
  await frozen()
  const guest = await scene.guest()
  guest.send('POST', '/note/lost')
  await handedOver(scene)
  const waiter = scene.post('/note/kept')
  await eventually(() => scene.app.db.snapshot().waiting === 1)
  guest.leave()
  scene.proxy.trap({ from: 'server', type: 'C', text: /^COMMIT$/ }, 'end')
  await thaw()
  const answers = [await leader, await waiter]
  const totals = { commits: 1, failedCommits: 1, invalidated: 1 }
  return {
    answers,
    expected: [told(scene, '500 COMMIT_UNKNOWN'), 200],
    rows: ['slow', 'kept'],
    connection: 'gone',
    totals,
  }
})

scenario(
  database,
  'a deferred write is refused together with COMMIT, and its client leaves before the answer',
  async (scene) => {
    await scene.open(
      withNotes({
        handler: async (db) => {
          await add(db, 'lost')
          db.add(db.insertInto('notes').values({ note: null as unknown as string }))
          return 'no success'
        },
      }),
    )
    const answerToCommit = scene.proxy.trap({ from: 'server', type: 'E', text: '23502' }, 'hold')
    const guest = await scene.guest()
    guest.send('POST', '/', {})
    await answerToCommit.sprung
    const waiter = scene.post('/note/kept')
    await handedOver(scene)
    guest.leave()
    await new Promise((resolve) => setImmediate(resolve))
    answerToCommit.release()
    const totals = { commits: 1, failedCommits: 1, invalidated: 0 }
    return { answers: [await waiter], expected: [200], rows: ['kept'], connection: 'reused', totals }
  },
)

scenario(database, 'the raw client waits in a hole, its user leaves, and somebody waits', async (scene) => {
  await scene.open(
    withNotes({
      settleTimeoutMillis: 400,
      handler: async (db) => {
        await add(db, 'lost')
        await db.withClient(async (client) => {
          scene.proxy.swallow()
          scene.reached.open(1)
          await client.query("insert into notes (note) values ('lost')")
        })
      },
    }),
  )
  const guest = await scene.guest()
  guest.send('POST', '/', {})
  await scene.reached.opened
  const waiter = scene.post('/note/kept')
  await eventually(() => scene.app.db.snapshot().waiting === 1)
  guest.leave()
  return {
    answers: [await waiter],
    expected: [200],
    rows: ['kept'],
    connection: 'gone',
    totals: { invalidated: 1, opened: 1 },
  }
})
