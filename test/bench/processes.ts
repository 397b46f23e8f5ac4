import t from 'tap'
import type { LoadCalls } from '../../bench/load.ts'
import { Processes } from '../../bench/processes.ts'

const NOBODY = { subject: 'read', port: 1, perSecond: 1, warmUpMillis: 60_000, millis: 0 } as const

t.test('a process that ends before it is ready is a failure', async (t) => {
  const processes = new Processes()
  await t.rejects(processes.start('./schema.ts'), /schema\.ts ended with 0/)
  await processes.stop()
})

t.test('who waits for an answer is told that there will be none', async (t) => {
  const processes = new Processes()
  const load = await processes.start<LoadCalls>('./load.ts')
  const answer = t.rejects(load.ask('openLoop', NOBODY), /load\.ts ended with/)
  await processes.stop()
  await answer
  await processes.stop()
})

t.test('nothing is started any more once it is being stopped', async (t) => {
  const processes = new Processes()
  await processes.stop()
  await t.rejects(processes.start('./load.ts'), /being stopped/)
})
