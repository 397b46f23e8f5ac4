import { setTimeout as sleep } from 'node:timers/promises'
import type { Answer } from '../call.ts'
import { INSERT } from '../contender.ts'
import { type Scenario, WAIT_MILLIS } from '../scenario.ts'

const killedBetween: Scenario = {
  name: 'backend killed while the handler works',
  what: 'The backend is terminated between two statements of a handler. Right: an error, no row, and the process lives.',
  serve: ({ post, come, when }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      come('working')
      await when('go on')
      await query(INSERT, ['b'])
      return 'done'
    }),
  play: async ({ call, when, come, witness }) => {
    const { answer } = call('POST', '/work')
    await when('working')
    await witness.terminate()
    await sleep(100)
    await come('go on')
    return { deeds: [{ answer: await answer, answered: 'error', notes: ['a', 'b'] }] }
  },
}

const killedDuring: Scenario = {
  name: 'backend killed during a statement',
  what: 'The backend is terminated while it runs a statement. Right: as above.',
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      await query('select pg_sleep(8)')
      return 'done'
    }),
  play: async ({ call, witness }) => {
    const { answer } = call('POST', '/work')
    await witness.running('pg_sleep')
    await witness.terminate()
    return { deeds: [{ answer: await answer, answered: 'error', notes: ['a'] }] }
  },
}

const restarted: Scenario = {
  name: 'server restarted between requests',
  what: 'Both idle connections of the pool are terminated, as a restart does; then two requests come. Right: both succeed.',
  size: 2,
  serve: ({ post, come, when }) => {
    post('/first', async ({ query }) => {
      await query('select 1')
      come('first')
      await when('go on')
      return 'done'
    })
    post('/second', async ({ query }) => {
      await query('select 1')
      return 'done'
    })
    post('/work', async ({ query }, request) => {
      await query(INSERT, [noteOf(request.query)])
      return 'done'
    })
  },
  play: async ({ call, when, come, witness }) => {
    const first = call('POST', '/first')
    await when('first')
    await call('POST', '/second').answer
    await come('go on')
    await first.answer
    await witness.terminate()
    const answers = await Promise.all(['a', 'b'].map((note) => call('POST', `/work?note=${note}`).answer))
    return { deeds: answers.map((answer, at) => ({ answer, answered: 'ok', notes: ['ab'.charAt(at)] })) }
  },
}

const silentIdle: Scenario = {
  name: 'idle connection dead without a word',
  what: 'A firewall forgets the idle connection: what is sent on it gets lost. Right: the next request succeeds.',
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      return 'done'
    }),
  play: async ({ call, network }) => {
    await call('POST', '/ordinary').answer
    await sleep(1300)
    network.silence()
    return { deeds: [{ answer: await call('POST', '/work').answer, answered: 'ok', notes: ['a'] }] }
  },
}

const usedUp: Scenario = {
  name: 'pool used up',
  what: `A request holds the only connection, another waits, ${WAIT_MILLIS / 1000} s at most. Right: it gets an error in time, and the log says who holds the connection.`,
  serve: ({ post, come, when }) => {
    post('/holder', async ({ query }) => {
      await query(INSERT, ['a'])
      come('holding')
      await when('go on')
      return 'done'
    })
    post('/waiter', async ({ query }) => {
      await query(INSERT, ['b'])
      return 'done'
    })
  },
  play: async ({ call, when, come, log }) => {
    const holder = call('POST', '/holder')
    await when('holding')
    const answer = await call('POST', '/waiter').answer
    const complaints = (await log()).join().includes('/holder') ? [] : ['does not say who holds it']
    await come('go on')
    return {
      deeds: [
        { who: 'the holder', answer: await holder.answer, answered: 'ok', notes: ['a'] },
        { answer, answered: 'error', notes: ['b'] },
      ],
      complaints: answeredError(answer) ? complaints : [],
    }
  },
}

const shutDown: Scenario = {
  name: 'SIGTERM with a request in flight',
  what: 'The app closes on SIGTERM while a handler works. Right: the request succeeds, then the process exits with 0.',
  ends: true,
  serve: ({ post, come, when }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      come('working')
      await when('go on')
      await query(INSERT, ['b'])
      return 'done'
    }),
  play: async ({ call, when, come, terminate }) => {
    const { answer } = call('POST', '/work')
    await when('working')
    const ended = terminate()
    await sleep(200)
    await come('go on')
    const deed = { answer: await answer, answered: 'ok', notes: ['a', 'b'] } as const
    const code = await ended
    return { deeds: [deed], complaints: code === '0' ? [] : [code ? `exits with ${code}` : 'does not exit'] }
  },
}

const noteOf = (query: unknown) => (query as { note: string }).note
const answeredError = (answer: Answer) => typeof answer === 'object' && answer.status >= 400

/** Connections that die, or are not there. */
export const CONNECTIONS = [killedBetween, killedDuring, restarted, silentIdle, usedUp, shutDown]
