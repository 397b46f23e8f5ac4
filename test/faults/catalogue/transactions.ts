import { sql } from 'kysely'
import type { Session } from '../../../lib/index.ts'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { gate } from '../../support/gate.ts'
import { add, pidOf, terminate } from '../../support/notebook.ts'
import { type Scene, type SceneOptions, scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* Whether the answer tells the truth about the rows. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, {
  sql: `${NOTES};
    create function at_commit() returns trigger language plpgsql as $$
    begin
      if new.note = 'no parent' then raise exception 'no parent' using errcode = '23503'; end if;
      if new.note = 'disk full' then raise exception 'disk full' using errcode = '53100'; end if;
      return null;
    end $$;
    create constraint trigger at_commit after insert on notes deferrable initially deferred
      for each row execute function at_commit();
    create table counters (id int primary key, n int not null);
    insert into counters values (1, 0), (2, 0)`,
})

/** In `onResponse` the answer has left when COMMIT fails. */
const toldAfter = (scene: Scene, code: string) => [scene.commitOn === 'onSend' ? `500 ${code}` : 200]

scenario(database, '34 the handler swallows the error of a statement', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      await sql`select 1/0`.execute(db).catch(() => {})
      return 'all is well'
    },
  })
  const answers = [await scene.post()]
  return { answers, expected: ['500 TRANSACTION_ABORTED'], rows: [], connection: 'reused', totals: { commits: 0 } }
})

for (const [number, what, code] of [
  ['35', 'no parent', '23503'],
  ['38', 'disk full', '53100'],
] as const) {
  scenario(database, `${number} COMMIT fails with ${code}, and a neighbour waits for the connection`, async (scene) => {
    await scene.open({
      pool: { size: 1 },
      handler: writes('kept'),
      routes: (app) => {
        app.post('/failing', async ({ db }) => {
          await add(db, what)
          scene.reached.open(1)
          await scene.goOn.opened
          return 'done'
        })
      },
    })
    const failing = scene.post('/failing')
    await scene.reached.opened
    const neighbour = scene.post()
    await eventually(() => scene.app.db.snapshot().waiting === 1)
    scene.goOn.open()
    const answers = [await failing, await neighbour]
    const expected = [...toldAfter(scene, code), 200]
    return { answers, expected, rows: ['kept'], connection: 'reused', totals: { failedCommits: 1, commits: 1 } }
  })
}

/** Two requests that wait for each other in the middle; their answers, the better one first. */
async function twoAtATime(
  scene: Scene,
  options: SceneOptions,
  work: (db: Session, meet: () => Promise<void>, own: number) => Promise<unknown>,
) {
  let there = 0
  const both = gate()
  const meet = async () => {
    if (++there === 2) both.open()
    await both.opened
  }
  await scene.open({
    pool: { size: 2 },
    ...options,
    routes: (app) => {
      app.post<{ Params: { own: string } }>('/own/:own', async ({ db, params }) => {
        await work(db, meet, Number(params.own))
        return 'done'
      })
    },
  })
  const answers = await Promise.all([scene.post('/own/1'), scene.post('/own/2')])
  return answers.sort((one, other) => one.status - other.status)
}

// In `onResponse` it may show only at COMMIT, when nobody can be told any more.
scenario(
  database,
  '36 a serialization failure',
  async (scene) => {
    const answers = await twoAtATime(scene, { isolationLevel: 'serializable' }, async (db, meet) => {
      await sql`select count(*) from notes`.execute(db)
      await meet()
      await add(db, 'one of them')
    })
    const totals = { commits: 1, invalidated: 0 }
    return { answers, expected: [200, '500 40001'], rows: ['one of them'], connection: 'reused', totals }
  },
  ['onSend'],
)

scenario(database, '37 a deadlock', async (scene) => {
  const answers = await twoAtATime(scene, {}, async (db, meet, own) => {
    await add(db, 'one of them')
    await sql`update counters set n = n + 1 where id = ${own}`.execute(db)
    await meet()
    await sql`update counters set n = n + 1 where id = ${3 - own}`.execute(db)
  })
  const totals = { commits: 1, invalidated: 0 }
  return { answers, expected: [200, '500 40P01'], rows: ['one of them'], connection: 'reused', totals }
})

scenario(database, '40 ROLLBACK fails: the handler’s own error is the answer', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'lost')
      scene.proxy.cut('reset')
      throw Object.assign(new Error('mine'), { code: 'MINE' })
    },
  })
  return { answers: [await scene.post()], expected: ['500 MINE'], rows: [], connection: 'gone' }
})

scenario(database, '41 transaction() inside the session is a savepoint', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await db.transaction().execute((db) => add(db, 'lost'))
      throw Object.assign(new Error('mine'), { code: 'MINE' })
    },
  })
  return { answers: [await scene.post()], expected: ['500 MINE'], rows: [], connection: 'reused' }
})

scenario(database, '42 the inner one fails and the outer one goes on', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'A')
      const inner = db.transaction().execute(async (db) => {
        await add(db, 'B')
        throw new Error('undo')
      })
      await inner.catch(() => {})
      await add(db, 'C')
      return 'done'
    },
  })
  return { answers: [await scene.post()], expected: [200], rows: ['A', 'C'], connection: 'reused' }
})

scenario(database, '44 a helper nests again in the middle of a nested transaction', async (scene) => {
  const helper = (db: Session) => db.transaction().execute((db) => add(db, 'by the helper'))
  const pids = new Set<number>()
  await scene.open({
    handler: async (db) => {
      await db.transaction().execute(async (inner) => {
        pids.add(await pidOf(inner))
        await helper(db)
        pids.add(await pidOf(inner))
      })
      pids.add(await pidOf(db))
      return 'done'
    },
  })
  const answers = [await scene.post()]
  scene.t.equal(pids.size, 1)
  return { answers, expected: [200], rows: ['by the helper'], connection: 'reused' }
})

scenario(database, '46 destroy(), connection() and startTransaction() in a handler', async (scene) => {
  await scene.open({
    handler: async (db) => {
      const own = await pidOf(db)
      const lent = await db.connection().execute((db) => pidOf(db))
      scene.t.equal(lent, own)
      const controlled = await db.startTransaction().execute()
      await add(controlled, 'undone')
      await controlled.rollback().execute()
      await add(db, 'kept')
      await db.destroy().catch(() => {})
      return 'done'
    },
  })
  const answers = [await scene.post(), await scene.post()]
  return { answers, expected: [200, 200], rows: ['kept', 'kept'], connection: 'reused' }
})

for (const [what, deed] of [
  ['is refused by the server', undefined],
  ['meets a connection that dies', 'reset'],
] as const) {
  scenario(database, `47 BEGIN ${what}`, async (scene) => {
    await scene.open({
      ...(deed === undefined && {
        settings: ({ method }) => (method === 'POST' ? { transaction_isolation: 'foo' } : {}),
      }),
      handler: writes('kept'),
    })
    if (deed) scene.proxy.trap({ from: 'client', type: 'P', text: 'BEGIN' }, deed, { times: 3 })
    const answers = [await scene.post()]
    const expected = [deed === undefined ? '500 22023' : '503 CONNECTION_LOST']
    return { answers, expected, rows: [], connection: deed ? 'gone' : 'reused', totals: { commits: 0 } }
  })
}

scenario(database, '48 isolation, read only and deferrable are the route’s own', async (scene) => {
  const found: unknown[] = []
  await scene.open({
    pool: { size: 1 },
    handler: async (db) => {
      const { rows } = await sql`select current_setting('transaction_isolation') as level`.execute(db)
      found.push(rows[0])
      return writes('kept')(db)
    },
    routes: (app) => {
      const config = { db: { isolationLevel: 'serializable', readOnly: true, deferrable: true } } as const
      app.post('/read-only', { config }, ({ db }) => writes('lost')(db))
    },
  })
  const answers = [await scene.post('/read-only'), await scene.post()]
  scene.t.strictSame(found, [{ level: 'read committed' }])
  return { answers, expected: ['500 25006', 200], rows: ['kept'], connection: 'reused' }
})

scenario(database, '49 rollback() and commit() by hand', async (scene) => {
  await scene.open({
    handler: async (db) => {
      await add(db, 'rolled back')
      await db.rollback()
      return 'done'
    },
    routes: (app) => {
      app.post('/commits', async ({ db }) => {
        await add(db, 'A')
        await db.commit()
        await add(db, 'B')
        throw Object.assign(new Error('mine'), { code: 'MINE' })
      })
    },
  })
  const answers = [await scene.post(), await scene.post('/commits')]
  return { answers, expected: [200, '500 MINE'], rows: ['A'] }
})

scenario(database, '50 the backend is killed inside a nested transaction', async (scene) => {
  await scene.open({
    handler: (db) =>
      db.transaction().execute(async (inner) => {
        await add(inner, 'lost')
        await terminate(database, await pidOf(inner))
        await add(inner, 'lost')
      }),
  })
  const answers = [await scene.post()]
  const undone = scene.proxy
    .statements()
    .flat()
    .filter((text) => /^rollback to/i.test(text))
  scene.t.strictSame(undone, [], 'nothing is sent on the dead connection')
  return { answers, expected: ['503 CONNECTION_LOST'], rows: [], connection: 'gone' }
})
