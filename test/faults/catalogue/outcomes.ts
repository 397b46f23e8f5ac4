import { sql } from 'kysely'
import { createDatabase } from '../../support/database.ts'
import { eventually } from '../../support/eventually.ts'
import { openHttp } from '../../support/http-client.ts'
import { add, pidOf } from '../../support/notebook.ts'
import { scenario, writes } from '../../support/scenario.ts'
import { NOTES } from '../../support/schema.ts'
import { t } from '../../support/test.ts'

/* How a request ends, and what that does to its rows. The numbers are those of docs/faults.md. */

const database = await createDatabase(t, {
  sql: `${NOTES};
    create function at_commit() returns trigger language plpgsql as $$
    begin
      if new.note = 'no parent' then raise exception 'no parent' using errcode = '23503'; end if;
      return null;
    end $$;
    create constraint trigger at_commit after insert on notes deferrable initially deferred
      for each row execute function at_commit()`,
})
const mine = () => Object.assign(new Error('mine'), { code: 'MINE' })

for (const status of [500, 404]) {
  scenario(database, `80 reply.code(${status}).send()`, async (scene) => {
    await scene.open({
      handler: async (db, _request, reply) => {
        await add(db, 'lost')
        return reply.code(status).send({ sorry: true })
      },
    })
    return { answers: [await scene.post()], expected: [status], rows: [], connection: 'reused' }
  })
}

scenario(database, '82 an error handler answers 200', async (scene) => {
  await scene.open({
    routes: (app) => {
      const errorHandler = async () => 'never mind'
      app.post('/forgiven', { errorHandler }, async ({ db }) => {
        await add(db, 'lost')
        throw null
      })
    },
  })
  return { answers: [await scene.post('/forgiven')], expected: [200], rows: [], connection: 'reused' }
})

for (const how of ['throws', 'sets 500'] as const) {
  scenario(database, `84 a later onSend hook ${how}`, async (scene) => {
    await scene.open({
      handler: writes('lost'),
      routes: (app) => {
        app.addHook('onSend', async ({ url }, reply) => {
          if (url !== '/' || reply.statusCode !== 200) return
          if (how === 'throws') throw mine()
          reply.code(500)
        })
      },
    })
    const expected = [how === 'throws' ? '500 MINE' : 500]
    return { answers: [await scene.post()], expected, rows: [], connection: 'reused' }
  })
}

for (const how of ['ends', 'is left by its client', 'throws', 'commits by hand'] as const) {
  scenario(database, `86 a hijacked reply ${how}`, async (scene) => {
    await scene.open({
      handler: async (db, _request, reply) => {
        await add(db, 'hijacked')
        reply.hijack()
        scene.reached.open(1)
        if (how === 'is left by its client') return
        if (how === 'throws') throw mine()
        if (how === 'commits by hand') await db.commit()
        reply.raw.end('raw')
      },
    })
    const guest = await scene.guest()
    guest.send('POST', '/')
    await scene.reached.opened
    const isOver = how === 'ends' || how === 'commits by hand'
    const answers = isOver ? [await guest.answer()] : []
    if (!isOver) guest.leave()
    await eventually(() => scene.app.db.snapshot().checkedOut === 0)
    const warned = scene.log.problems().filter(({ msg }) => msg.includes('hijacked'))
    scene.t.equal(warned.length, how === 'ends' ? 1 : 0, 'one warning where it just ends')
    const rows = how === 'commits by hand' ? ['hijacked'] : []
    return { answers, expected: answers.map(() => 200), rows, connection: 'reused' }
  })
}

scenario(database, '87 callNotFound()', async (scene) => {
  await scene.open({
    handler: async (db, _request, reply) => {
      await add(db, 'lost')
      reply.callNotFound()
    },
  })
  return { answers: [await scene.post()], expected: [404], rows: [], connection: 'reused' }
})

scenario(
  database,
  '88 COMMIT fails after the answer has left',
  async (scene) => {
    await scene.open({ handler: writes('no parent') })
    const answers = [await scene.post()]
    await eventually(() => scene.log.lines.some(({ level, err }) => level === 50 && err?.code === '23503'))
    const [logged] = scene.log.lines.filter(({ err }) => err?.code === '23503')
    scene.t.match(logged, { reqId: /req-/ })
    return { answers, expected: [200], rows: [], connection: 'reused', totals: { failedCommits: 1 } }
  },
  ['onResponse'],
)

for (const how of ['is aborted', 'is no JSON'] as const) {
  scenario(database, `89 the session is opened in onRequest, and the upload ${how}`, async (scene) => {
    await scene.open({
      routes: (app) => {
        const onRequest = async ({ db }: { db: Parameters<typeof add>[0] }) => {
          await add(db, 'lost')
          scene.reached.open(1)
        }
        app.post('/upload', { onRequest }, async () => 'uploaded')
      },
    })
    const client = await openHttp(scene.t, scene.app)
    if (how === 'is aborted') {
      client.send('POST', '/upload', { body: { a: 1 }, withhold: 3 })
      await scene.reached.opened
      client.destroy()
      await eventually(() => scene.app.db.snapshot().checkedOut === 0)
      return { answers: [], expected: [], rows: [], connection: 'reused' }
    }
    const { status } = await client.send('POST', '/upload', { body: '{ "a"' }).response()
    scene.t.equal(status, 400)
    return { answers: [], expected: [], rows: [], connection: 'reused' }
  })
}

for (const [name, status] of [
  ['302', 302],
  ['304', 304],
  ['204', 204],
] as const) {
  scenario(database, `90 ${name} keeps what was written`, async (scene) => {
    await scene.open({
      handler: async (db, _request, reply) => {
        await add(db, 'kept')
        return status === 302 ? reply.redirect('/elsewhere') : reply.code(status).send()
      },
    })
    return { answers: [await scene.post()], expected: [status], rows: ['kept'], connection: 'reused' }
  })
}

scenario(database, '90 HEAD keeps what was written', async (scene) => {
  await scene.open({ routes: (app) => app.get('/written', ({ db }) => writes('kept')(db)) })
  const guest = await scene.guest()
  guest.send('HEAD', '/written')
  return { answers: [await guest.answer()], expected: [200], rows: ['kept'], connection: 'reused' }
})

scenario(database, '91 hooks and handler share one session', async (scene) => {
  const pids = new Set<number>()
  await scene.open({
    routes: (app) => {
      const preHandler = async ({ db }: { db: Parameters<typeof add>[0] }) => void pids.add(await pidOf(db))
      app.post('/shared', { preHandler }, async ({ db }) => {
        pids.add(await pidOf(db))
        await sql`select 1`.execute(db)
        return writes('kept')(db)
      })
    },
  })
  const answers = [await scene.post('/shared')]
  scene.t.equal(pids.size, 1)
  const texts = scene.proxy.statements().flat()
  scene.t.equal(texts.filter((text) => text.startsWith('BEGIN')).length, 1)
  return { answers, expected: [200], rows: ['kept'], connection: 'reused', totals: { checkouts: 1, commits: 1 } }
})
