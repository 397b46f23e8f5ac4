import { setTimeout as sleep } from 'node:timers/promises'
import { INSERT } from '../contender.ts'
import type { Scenario } from '../scenario.ts'

const LOCK_FREE_WITHIN_MILLIS = 2000
const ROWS = 20_000

const leavesWorking: Scenario = {
  name: 'client leaves while the handler works',
  what: 'Its POST has been read; it goes away between two statements of the handler. Right: no row.',
  serve: ({ post, come, when }) =>
    post('/work', async ({ query }) => {
      await query(INSERT, ['a'])
      come('working')
      await when('go on')
      try {
        await query(INSERT, ['b'])
        return 'done'
      } finally {
        come('done')
      }
    }),
  play: async ({ call, when, come }) => {
    const work = call('POST', '/work')
    await when('working')
    work.leave()
    await when('/work is left')
    await come('go on')
    await when('done')
    await sleep(100)
    return { deeds: [{ answer: await work.answer, answered: 'nobody', notes: ['a', 'b'] }] }
  },
}

const leavesLocked: Scenario = {
  name: 'client leaves during a long statement',
  what: 'The transaction has locked a row, and its next statement takes 8 s. Right: the lock is free within 2 s.',
  size: 2,
  serve: ({ post }) =>
    post('/work', async ({ query }) => {
      await query(`update notes set note = note where run = current_setting('application_name')`)
      await query('select pg_sleep(8)')
      return 'done'
    }),
  play: async ({ call, when, witness }) => {
    await witness.write('locked')
    const work = call('POST', '/work')
    await witness.running('pg_sleep')
    work.leave()
    await when('/work is left')
    const isFree = await witness.lockIsFree('locked', LOCK_FREE_WITHIN_MILLIS)
    return {
      deeds: [{ answer: await work.answer, answered: 'nobody', notes: [] }],
      complaints: isFree ? [] : ['keeps the lock'],
    }
  },
}

const leavesWaiting: Scenario = {
  name: 'client leaves while it waits for a connection',
  what: 'Another request holds the only one until after that. Right: no row of it.',
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
  play: async ({ call, when, come }) => {
    const holder = call('POST', '/holder')
    await when('holding')
    const waiter = call('POST', '/waiter')
    await sleep(200)
    waiter.leave()
    await when('/waiter is left')
    await come('go on')
    const held = await holder.answer
    await sleep(300)
    return {
      deeds: [
        { who: 'the holder', answer: held, answered: 'ok', notes: ['a'] },
        { answer: await waiter.answer, answered: 'nobody', notes: ['b'] },
      ],
    }
  },
}

const streams: Scenario = {
  name: 'stream of a cursor as the answer',
  what: `The handler writes, and answers with ${ROWS} rows that are read through a cursor in its transaction. Right: all of them come, and the row is there.`,
  serve: ({ contender }) => contender.stream('/numbers'),
  play: async ({ call }) => {
    const answer = await call('GET', '/numbers').answer
    const isWhole = typeof answer === 'object' && answer.body.split('\n').length === ROWS + 1
    return {
      deeds: [{ answer, answered: 'ok', notes: ['streamed'], kept: isWhole ? 'all' : 'none' }],
      complaints: typeof answer === 'object' && answer.status === 200 && !isWhole ? ['200 and not all rows'] : [],
    }
  },
}

const leavesStream: Scenario = {
  name: 'client leaves in the middle of a stream',
  what: 'As above, and the client goes away after the first rows. Right: no row, and the connection is free within a second.',
  serve: streams.serve,
  play: async ({ call, when }) => {
    const work = call('GET', '/numbers')
    // Who cannot stream answers with an error instead, and there is nothing in whose middle one could leave.
    if ((await work.begun) >= 400)
      return { deeds: [{ answer: await work.answer, answered: 'ok', notes: ['streamed'] }] }
    work.leave()
    await when('/numbers is left')
    return { deeds: [{ answer: await work.answer, answered: 'nobody', notes: ['streamed'] }] }
  },
}

/** Clients that leave, and streams. */
export const CLIENTS = [leavesWorking, leavesLocked, leavesWaiting, streams, leavesStream]
