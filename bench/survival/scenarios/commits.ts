import { INSERT } from '../contender.ts'
import type { Scenario } from '../scenario.ts'

const swallowed: Scenario = {
  name: "handler swallows a statement's error",
  what: 'A statement fails, the handler catches that and returns. PostgreSQL answers COMMIT with ROLLBACK. Right: an error.',
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      await query('select 1/0').catch(() => {})
      return 'done'
    }),
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a'] }],
  }),
}

const deferred: Scenario = {
  name: 'COMMIT fails, neighbours wait',
  what: 'A deferred constraint fails at COMMIT, and two requests wait for the connection. Right: an error for the first, the others succeed.',
  serve: ({ post, come, when }) => {
    post('/work', async ({ query }) => {
      await query(INSERT, ['doomed'])
      come('working')
      await when('go on')
      return 'done'
    })
    post('/neighbour', async ({ query }, request) => {
      const { note } = request.query as { note: string }
      await query(INSERT, [note])
      await query('select pg_sleep(0.2)')
      await query(INSERT, [`${note}, too`])
      return 'done'
    })
  },
  play: async ({ call, when, come }) => {
    const first = call('POST', '/work')
    await when('working')
    const neighbours = ['b', 'c'].map((note) => ({ note, call: call('POST', `/neighbour?note=${note}`) }))
    await come('go on')
    const own = { answer: await first.answer, answered: 'error', notes: ['doomed'] } as const
    const others = neighbours.map(async ({ note, call }) => {
      const notes = [note, `${note}, too`]
      return { who: 'a neighbour', answer: await call.answer, answered: 'ok', notes } as const
    })
    return { deeds: [own, ...(await Promise.all(others))] }
  },
}

const write: Scenario['serve'] = ({ post }) =>
  post('/work', async ({ query }) => {
    await query(INSERT, ['a'])
    return 'done'
  })

const lostAnswer: Scenario = {
  name: "COMMIT's answer is lost",
  what: 'COMMIT is done, but the connection breaks before its answer comes. Right: an error, and the process lives. Whether the row is there nobody can know.',
  serve: write,
  play: async ({ call, network }) => {
    network.failAt('COMMIT', 'lost answer')
    return { deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a'], kept: 'either' }] }
  },
}

const silentCommit: Scenario = {
  name: 'network silent from COMMIT on',
  what: 'COMMIT gets lost on the way, and nobody is told. Right: an error within 4 s, and the next request succeeds.',
  serve: write,
  play: async ({ call, network }) => {
    network.failAt('COMMIT', 'silence')
    return { deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a'], kept: 'either' }] }
  },
}

const rollbackFails: Scenario = {
  name: 'ROLLBACK fails',
  what: "The handler throws, and the connection breaks when ROLLBACK is sent. Right: the handler's own error is answered.",
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      throw new Error('my own error')
    }),
  play: async ({ call, network }) => {
    network.failAt('ROLLBACK', 'reset')
    const answer = await call('POST', '/work').answer
    const hidden = typeof answer === 'object' && !answer.body.includes('my own error')
    return {
      deeds: [{ answer, answered: 'error', notes: ['a'] }],
      complaints: hidden ? ["the handler's own error is hidden"] : [],
    }
  },
}

const laterHook: Scenario = {
  name: 'a later onSend hook fails',
  what: "One of the app's own onSend hooks throws, so that 500 is answered. Right: no row.",
  serve: (stage) => {
    stage.app.addHook('onSend', async ({ url }, { statusCode }) => {
      if (url === '/work' && statusCode < 400) throw new Error('no answer can be made of it')
    })
    write(stage)
  },
  play: async ({ call }) => ({
    deeds: [{ answer: await call('POST', '/work').answer, answered: 'error', notes: ['a'] }],
  }),
}

/** What COMMIT and ROLLBACK can come to. */
export const COMMITS = [swallowed, deferred, lostAnswer, silentCommit, rollbackFails, laterHook]
