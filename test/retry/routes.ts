import { sql } from 'kysely'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { openHttp } from '../support/http-client.ts'
import { holds, inBothModes } from '../support/modes.ts'
import { add, notesIn, pidOf, terminate } from '../support/notebook.ts'
import { oneRoute } from '../support/one-route.ts'
import { NOTES } from '../support/schema.ts'
import { t, test } from '../support/test.ts'

/* The handler runs again, in a new transaction, as long as nobody is answered and nothing was kept. */

const database = await createDatabase(t, {
  sql: `${NOTES};
    create table counters (id int primary key, value int not null)`,
})
t.beforeEach(async () => {
  await database.query('delete from notes')
  await database.query('delete from counters')
  await database.query('insert into counters values (1, 0)')
})

/** An error as PostgreSQL would send it, from PostgreSQL. */
const raise = (state: string) => sql.raw(`do $$ begin raise exception 'raised' using errcode = '${state}'; end $$`)

for (const state of ['40001', '40P01']) {
  inBothModes(
    database,
    `after ${state} the handler runs again, and what it had written is written once`,
    async (t, commitOn) => {
      let runs = 0
      const { post } = await oneRoute(
        t,
        database,
        async (db) => {
          await add(db, `run ${++runs}`)
          if (runs < 3) await raise(state).execute(db)
          return { runs }
        },
        { commitOn, route: { retry: { attempts: 3 } } },
      )
      const answer = await post()
      t.equal(answer.statusCode, 200, answer.body)
      t.strictSame(answer.json(), { runs: 3 })
      await holds(t, database, ['run 3'])
    },
  )
}

inBothModes(database, 'a connection that is lost before COMMIT is one more reason', async (t, commitOn) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      await add(db, `run ${++runs}`)
      if (runs === 1) await terminate(database, await pidOf(db))
      await add(db, 'more')
      return { runs }
    },
    { commitOn, route: { retry: {} } },
  )
  t.strictSame((await post()).json(), { runs: 2 })
  await holds(t, database, ['run 2', 'more'])
})

inBothModes(
  database,
  'when the attempts have run out the answer is 503, and its cause is the last error',
  async (t, commitOn) => {
    let runs = 0
    const { app, post, log } = await oneRoute(
      t,
      database,
      async (db) => {
        runs++
        await add(db, 'never')
        await raise('40001').execute(db)
      },
      { commitOn, route: { retry: { attempts: 4 } } },
    )
    const answer = await post()
    t.equal(answer.statusCode, 503)
    t.match(answer.json(), { code: 'FST_REQUEST_DB_RETRIES_EXHAUSTED', message: /^None of 4 attempts succeeded/ })
    t.notMatch(answer.body, /raised/, 'what PostgreSQL said is for the log')
    t.equal(runs, 4)
    t.equal(log.lines.filter(({ msg }) => String(msg).includes('is made again')).length, 3)
    await holds(t, database, [])
    t.equal(app.db.snapshot().totals.rollbacks, 4)
  },
)

inBothModes(database, 'other errors are not tried again', async (t, commitOn) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      runs++
      await raise('23505').execute(db)
    },
    { commitOn, route: { retry: {} } },
  )
  const answer = await post()
  t.equal(answer.statusCode, 500)
  t.equal(answer.json().code, '23505')
  t.equal(runs, 1)
})

test('`on` says which: codes, ours without their prefix too, or a rule', async (t) => {
  for (const on of [['23505'], (error: Error) => (error as { code?: string }).code === '23505']) {
    let runs = 0
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        if (++runs === 1) await raise('23505').execute(db)
        return { runs }
      },
      { route: { retry: { attempts: 2, on } } },
    )
    t.strictSame((await post()).json(), { runs: 2 })
  }
  for (const on of [['CONNECTION_LOST'], ['FST_REQUEST_DB_CONNECTION_LOST']]) {
    let runs = 0
    const { post } = await oneRoute(
      t,
      database,
      async (db) => {
        if (++runs === 1) await terminate(database, await pidOf(db))
        await add(db, 'x')
        return { runs }
      },
      { route: { retry: { attempts: 2, on } } },
    )
    t.strictSame((await post()).json(), { runs: 2 })
  }
})

test('an error that the app has wrapped is known by its cause', async (t) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      if (++runs > 1) return { runs }
      return raise('40001')
        .execute(db)
        .catch((cause: unknown) => {
          throw new Error('booking failed', { cause })
        })
    },
    { route: { retry: {} } },
  )
  t.strictSame((await post()).json(), { runs: 2 })
})

test('an error that the handler swallowed is known when COMMIT tells of it', async (t) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      if (++runs === 1)
        await raise('40001')
          .execute(db)
          .catch(() => {})
      else await add(db, 'kept')
      return { runs }
    },
    { route: { retry: { on: ['40001', 'TRANSACTION_ABORTED'] } } },
  )
  t.strictSame((await post()).json(), { runs: 2 })
  t.strictSame(await notesIn(database), ['kept'])
})

test('a COMMIT that fails with a serialization failure is tried again: write skew', async (t) => {
  const bothHaveRead = gate()
  let readers = 0
  const { app } = await oneRoute(t, database, () => {}, {
    isolationLevel: 'serializable',
    beside: (app) => {
      app.post('/skew', { config: { db: { retry: { attempts: 5 } } } }, async (request, reply) => {
        const db = request.db.withTables<{ counters: { id: number; value: number } }>()
        await db.selectFrom('notes').selectAll().execute()
        if (++readers === 2) bothHaveRead.open()
        await bothHaveRead.opened
        db.add(db.insertInto('notes').values({ note: 'one' }))
        reply.code(201).header('location', '/notes/1')
        return { readers }
      })
    },
  })
  const answers = await Promise.all([1, 2].map(() => app.inject({ method: 'POST', url: '/skew' })))
  t.strictSame(
    answers.map(({ statusCode }) => statusCode),
    [201, 201],
  )
  t.ok(readers > 2, 'one of them ran again')
  t.strictSame(await notesIn(database), ['one', 'one'])
})

test('64 serializable writers on one row: all succeed or are answered 503, and no update is lost', async (t) => {
  const { app } = await oneRoute(t, database, () => {}, {
    isolationLevel: 'serializable',
    pool: { size: 8 },
    beside: (app) => {
      app.post('/count', { config: { db: { retry: { attempts: 40 } } } }, async (request) => {
        const db = request.db.withTables<{ counters: { id: number; value: number } }>()
        const { value } = await db.selectFrom('counters').select('value').where('id', '=', 1).executeTakeFirstOrThrow()
        await db
          .updateTable('counters')
          .set({ value: value + 1 })
          .where('id', '=', 1)
          .execute()
        db.afterCommit(() => {
          committed++
        })
        return 'ok'
      })
    },
  })
  let committed = 0
  const answers = await Promise.all(Array.from({ length: 64 }, () => app.inject({ method: 'POST', url: '/count' })))
  const good = answers.filter(({ statusCode }) => statusCode === 200).length
  const [{ value }] = (await database.query('select value from counters')) as [{ value: number }]
  t.ok(answers.every(({ statusCode }) => statusCode === 200 || statusCode === 503))
  t.equal(value, good, 'as many as were told so')
  t.equal(committed, good, 'afterCommit fires once for each')
  t.ok(good > 0)
})

inBothModes(database, 'callbacks of an attempt that failed are those of a rollback', async (t, commitOn) => {
  const calls: string[] = []
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      const run = ++runs
      db.afterCommit(() => calls.push(`committed ${run}`))
      db.afterRollback(() => calls.push(`rolled back ${run}`))
      await add(db, `run ${run}`)
      if (run === 1) await raise('40001').execute(db)
      return 'ok'
    },
    { commitOn, route: { retry: {} } },
  )
  t.equal((await post()).statusCode, 200)
  await holds(t, database, ['run 2'])
  t.strictSame(calls, ['rolled back 1', 'committed 2'])
})

test('the reply is as the handler found it: status and headers of the attempt before are gone', async (t) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db, _request, reply) => {
      if (++runs === 1) {
        reply.code(202).header('x-attempt', '1')
        await raise('40001').execute(db)
      }
      return { runs }
    },
    { route: { retry: {} } },
  )
  const answer = await post()
  t.equal(answer.statusCode, 200)
  t.notOk(answer.headers['x-attempt'])
})

test('what is left running of an attempt cannot use the session of the next one', async (t) => {
  let runs = 0
  const secondRuns = gate()
  const strayIsDone = gate()
  let stray: unknown
  const { post } = await oneRoute(
    t,
    database,
    async (db, request) => {
      const run = ++runs
      if (run === 2) {
        await add(db, 'second')
        secondRuns.open()
        await strayIsDone.opened
        return 'ok'
      }
      void secondRuns.opened
        .then(() => add(request.db, 'stray'))
        .catch((error: unknown) => {
          stray = error
        })
        .then(() => strayIsDone.open())
      return raise('40001').execute(db)
    },
    { route: { retry: {} } },
  )
  t.equal((await post()).statusCode, 200)
  t.equal((stray as { code?: string }).code, 'FST_REQUEST_DB_SESSION_ENDED')
  t.strictSame(await notesIn(database), ['second'])
})

test('after commit() by hand there is no second attempt: it would do what is kept twice', async (t) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db) => {
      runs++
      await add(db, 'kept')
      await db.commit()
      await raise('40001').execute(db)
    },
    { route: { retry: {} } },
  )
  const answer = await post()
  t.equal(answer.statusCode, 500)
  t.equal(answer.json().code, '40001')
  t.equal(runs, 1)
  t.strictSame(await notesIn(database), ['kept'])
})

test('a hook that has written stands in the way, one that has read does not', async (t) => {
  for (const [hook, expected] of [
    ['read', 200],
    ['raw read', 200],
    ['write', 500],
    ['add', 500],
  ] as const) {
    await database.query('delete from notes')
    let runs = 0
    const { app } = await oneRoute(t, database, () => {}, {
      beside: (app) => {
        const preHandler = async ({ db }: { db: typeof app.db.kysely & { add?: unknown } }) => {
          if (hook === 'read') await db.selectFrom('notes').selectAll().execute()
          else if (hook === 'raw read') await sql`select 1`.execute(db)
          else if (hook === 'write') await add(db, 'by the hook')
        }
        app.post(
          '/hooked',
          {
            config: { db: { retry: {} } },
            preHandler: async (request) => {
              if (hook === 'add') request.db.add(request.db.insertInto('notes').values({ note: 'by the hook' }))
              else await preHandler(request)
            },
          },
          async ({ db }) => {
            if (++runs === 1) await raise('40001').execute(db)
            return 'ok'
          },
        )
      },
    })
    t.equal((await app.inject({ method: 'POST', url: '/hooked' })).statusCode, expected, hook)
    t.strictSame(await notesIn(database), [], hook)
  }
})

test('who has answered by himself is not run again', async (t) => {
  let runs = 0
  const { post } = await oneRoute(
    t,
    database,
    async (db, _request, reply) => {
      runs++
      await add(db, 'kept')
      await reply.send({ runs })
      await raise('40001').execute(db)
      return reply
    },
    { route: { retry: {} } },
  )
  t.strictSame((await post()).json(), { runs: 1 })
  t.equal(runs, 1)
  t.strictSame(await notesIn(database), ['kept'])
})

test('handlers of every kind: 204 without a body, callback style, a status that rolls back, HEAD', async (t) => {
  const { app } = await oneRoute(t, database, () => {}, {
    beside: (app) => {
      const config = { db: { retry: {} } }
      app.delete('/none', { config }, async ({ db }, reply) => {
        await add(db, 'none')
        reply.code(204)
      })
      app.get('/callback', { config }, ({ db }, reply) => {
        add(db, 'callback').then(
          () => reply.send('ok'),
          (error) => reply.send(error),
        )
      })
      app.get('/refused', { config }, async ({ db }, reply) => {
        await add(db, 'refused')
        reply.code(409)
        return 'no'
      })
      app.get('/thrown', { config }, () => {
        throw Object.assign(new Error('at once'), { statusCode: 418 })
      })
      app.get('/web', { config }, async ({ db }) => {
        await add(db, 'web')
        return new Response(null, { status: 409 })
      })
    },
  })
  const status = async (method: 'DELETE' | 'GET' | 'HEAD', url: string) =>
    (await app.inject({ method, url })).statusCode
  t.equal(await status('DELETE', '/none'), 204)
  t.equal(await status('GET', '/callback'), 200)
  t.equal(await status('HEAD', '/callback'), 200)
  t.equal(await status('GET', '/refused'), 409)
  t.equal(await status('GET', '/thrown'), 418)
  t.equal(await status('GET', '/web'), 409)
  t.strictSame(await notesIn(database), ['none', 'callback', 'callback'])
})

test('COMMIT comes before the answer is made, and hooks behind it have a session of their own', async (t) => {
  const { app } = await oneRoute(t, database, () => {}, {
    beside: (app) => {
      app.get(
        '/hooked',
        {
          config: { db: { retry: {} } },
          preSerialization: async ({ db }, _reply, payload) => {
            t.strictSame(await notesIn(database), ['kept'])
            return { payload, count: (await db.selectFrom('notes').selectAll().execute()).length }
          },
        },
        async ({ db }) => {
          await add(db, 'kept')
          return { ok: true }
        },
      )
    },
  })
  t.strictSame((await app.inject('/hooked')).json(), { payload: { ok: true }, count: 1 })
})

test('a retry that cannot be is refused when the route is declared', async (t) => {
  for (const [route, option] of [
    [{ retry: { attempts: 0 } }, 'attempts'],
    [{ retry: { attempts: 1.5 } }, 'attempts'],
    [{ retry: { on: '40001' } }, 'on'],
    [{ retry: { times: 3 } }, 'times'],
    [{ retry: true }, 'retry'],
    [{ retry: {}, autocommit: true }, 'retry'],
  ] as const) {
    await t.rejects(
      oneRoute(t, database, () => {}, { route: route as never }),
      {
        code: 'FST_REQUEST_DB_INVALID_OPTION',
        message: new RegExp(option),
      },
    )
  }
})

test('the HEAD route of a GET makes as many attempts as it, and no more', async (t) => {
  const runs = { GET: 0, HEAD: 0 }
  const { app } = await oneRoute(t, database, () => {}, {
    beside: (app) => {
      app.get('/both', { config: { db: { retry: { attempts: 3 } } } }, async ({ db, method }) => {
        runs[method as 'GET']++
        await raise('40001').execute(db)
      })
    },
  })
  for (const method of ['GET', 'HEAD'] as const) t.equal((await app.inject({ method, url: '/both' })).statusCode, 503)
  t.strictSame(runs, { GET: 3, HEAD: 3 })
})

test('a client that leaves between two attempts is the end of them', async (t) => {
  let runs = 0
  const { app } = await oneRoute(t, database, () => {}, {
    beside: (app) => {
      app.post('/left', { config: { db: { retry: { attempts: 1000 } } } }, async ({ db }) => {
        await add(db, `run ${++runs}`)
        if (runs === 2) client.destroy()
        await raise('40001').execute(db)
      })
    },
  })
  const client = await openHttp(t, app)
  client.send('POST', '/left', { body: {} })
  await eventually(() => runs >= 2)
  await holds(t, database, [])
  const after = runs
  await app.db.ping()
  t.ok(runs <= after + 1)
})

test('a handler timeout is the end of them too', async (t) => {
  let runs = 0
  const { app } = await oneRoute(t, database, () => {}, {
    beside: (app) => {
      app.get('/slow', { handlerTimeout: 200, config: { db: { retry: { attempts: 1000 } } } }, async ({ db }) => {
        runs++
        await raise('40001').execute(db)
      })
    },
  })
  t.equal((await app.inject('/slow')).statusCode, 503)
  await holds(t, database, [])
  t.ok(runs < 1000)
})
