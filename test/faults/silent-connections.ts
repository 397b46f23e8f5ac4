import type { Session } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { add } from '../support/notebook.ts'
import { type Scene, scenario, writes } from '../support/scenario.ts'
import { NOTES } from '../support/schema.ts'
import { t } from '../support/test.ts'

/*
 * A connection that has fallen silent under a statement that nobody awaited: the commit waits for that statement, and when
 * nobody waits for the commit any more, the connection has to be given up.
 */

const database = await createDatabase(t, { sql: NOTES })

/** Before BEGIN is sent, or when it has been answered. */
const MOMENTS: Record<string, (db: Session, scene: Scene) => Promise<unknown>> = {
  'with BEGIN': async (_db, { proxy }) => proxy.swallow(),
  'behind BEGIN': async (db, { proxy }) => {
    await add(db, 'lost')
    proxy.swallow()
  },
}
const forget = (db: Session) => void add(db, 'forgotten').catch(() => {})

for (const [moment, prepare] of Object.entries(MOMENTS)) {
  scenario(database, `the statement left ${moment}: maxSessionMillis ends it`, async (scene) => {
    await scene.open({
      settleTimeoutMillis: 200,
      maxSessionMillis: 300,
      handler: async (db) => {
        await prepare(db, scene)
        forget(db)
        return 'done'
      },
    })
    const answer = await scene.post()
    const answers = scene.commitOn === 'onSend' ? [answer] : []
    await eventually(() => scene.app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
    const expected = scene.commitOn === 'onSend' ? ['503 CONNECTION_LOST'] : []
    return { answers, expected, rows: [], connection: 'gone', totals: { invalidated: 1 } }
  })

  for (const byHand of [false, true]) {
    const whose = byHand ? 'of a commit() by hand' : 'of the commit before the answer'
    scenario(
      database,
      `the statement left ${moment}: the client ${whose} leaves`,
      async (scene) => {
        await scene.open({
          settleTimeoutMillis: 200,
          handler: async (db) => {
            await prepare(db, scene)
            forget(db)
            scene.reached.open(1)
            if (byHand) await db.commit()
            return 'done'
          },
        })
        const guest = await scene.guest()
        guest.send('POST', '/')
        await scene.reached.opened
        await eventually(() => scene.app.db.snapshot().checkedOut === 1)
        guest.leave()
        await eventually(() => scene.app.db.snapshot().checkedOut === 0, { withinMillis: 5000 })
        return { answers: [], expected: [], rows: [], connection: 'gone', totals: { invalidated: 1 } }
      },
      ['onSend'],
    )
  }

  scenario(database, `the statement left ${moment}: the app is closed`, async (scene) => {
    await scene.open({
      settleTimeoutMillis: 200,
      closeGraceMillis: 200,
      handler: async (db) => {
        await prepare(db, scene)
        forget(db)
        scene.reached.open(1)
        return 'done'
      },
      routes: (app) => app.post('/other', ({ db }) => writes('x')(db)),
    })
    const answer = scene.post()
    await scene.reached.opened
    await eventually(() => scene.app.db.snapshot().checkedOut === 1)
    await scene.app.close()
    await answer
    scene.proxy.cut('reset')
    return { answers: [], expected: [], rows: [], next: 'closed' }
  })
}
