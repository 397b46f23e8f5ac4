import { setTimeout as sleep } from 'node:timers/promises'
import { INSERT } from '../contender.ts'
import type { Scenario } from '../scenario.ts'

const answersAnError: Scenario = {
  name: 'handler answers 500 without throwing',
  what: 'The handler writes, then answers with `reply.code(500)` and a body. Right: no row.',
  serve: ({ post }) =>
    post('/work', async ({ query }, _request, reply) => {
      await query(INSERT, ['a'])
      reply.code(500)
      return { error: 'it did not work out' }
    }),
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a'] }],
  }),
}

const handledError: Scenario = {
  name: 'error handler answers 200',
  what: "The handler throws, and the route's error handler makes a 200 of it. Right: 200, and no row.",
  serve: ({ contender }) =>
    contender.route(
      { method: 'POST', url: '/work', errorHandler: (_error, _request, reply) => void reply.code(200).send('handled') },
      async ({ query }) => {
        await query(INSERT, ['a'])
        throw new Error('my own error')
      },
    ),
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'ok', notes: ['a'], kept: 'none' }],
  }),
}

const timedOut: Scenario = {
  name: "Fastify's handlerTimeout",
  what: 'The handler takes longer than `handlerTimeout`, so that 503 is answered, and goes on. Right: no row.',
  serve: ({ contender, come, when }) =>
    contender.route({ method: 'GET', url: '/work', handlerTimeout: 300 }, async ({ query }) => {
      await query(INSERT, ['a'])
      await when('go on')
      try {
        await query(INSERT, ['b'])
        return 'done'
      } finally {
        come('done')
      }
    }),
  play: async ({ call, come, when }) => {
    const answer = await call('GET', '/work').answer
    await come('go on')
    await when('done')
    await sleep(100)
    return { deeds: [{ answer, answered: 'error', notes: ['a', 'b'] }] }
  },
}

const notAwaited: Scenario = {
  name: 'statement not awaited',
  what: 'The handler returns without waiting for its last statement. Right: its row is there after a 200.',
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      void query(INSERT, ['b'])
      return 'done'
    }),
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'either', notes: ['a', 'b'] }],
  }),
}

const sideBySide: Scenario = {
  name: 'five statements in a Promise.all, one fails',
  what: 'Right: an error, and none of the four rows.',
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      const inserts = ['a', 'b', 'c', 'd'].map((note) => query(INSERT, [note]))
      await Promise.all([query('select 1/0'), ...inserts])
      return 'done'
    }),
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a', 'b', 'c', 'd'] }],
  }),
}

const nested: Scenario = {
  name: 'nested transaction fails, the outer goes on',
  what: 'Right: 200, the rows of the outer transaction are there, that of the inner is not.',
  serve: ({ post }) =>
    post('/work', async ({ query, nested }) => {
      await query(INSERT, ['a'])
      await nested(async (inner) => {
        await inner(INSERT, ['b'])
        throw new Error('the inner one fails')
      }).catch(() => {})
      await query(INSERT, ['c'])
      return 'done'
    }),
  play: async ({ call }) => {
    const { answer } = call('POST', '/work')
    return {
      deeds: [
        { answer: await answer, answered: 'ok', notes: ['a', 'c'] },
        { answer: await answer, answered: 'ok', notes: ['b'], kept: 'none' },
      ],
    }
  },
}

const usedLater: Scenario = {
  name: 'handle used after the answer',
  what: 'A handler keeps its handle and uses it after the answer, while another request has the connection and then throws. Right: that is refused.',
  serve: ({ post, come, when, keep }) => {
    post('/keeper', async ({ query }) => {
      await query(INSERT, ['a'])
      keep(() => query(INSERT, ['late']))
      return 'done'
    })
    post('/other', async ({ query }) => {
      await query(INSERT, ['b'])
      come('working')
      await when('go on')
      throw new Error('my own error')
    })
  },
  play: async ({ call, when, come, later }) => {
    const own = { answer: await call('POST', '/keeper').answer, answered: 'ok', notes: ['a'] } as const
    const other = call('POST', '/other')
    await when('working')
    const wasPossible = await later()
    await come('go on')
    return {
      deeds: [own, { who: 'the other', answer: await other.answer, answered: 'error', notes: ['b'] }],
      complaints: wasPossible ? ["runs in another request's transaction"] : [],
    }
  },
}

/** What handlers do. */
export const HANDLERS = [answersAnError, handledError, timedOut, notAwaited, sideBySide, nested, usedLater]
