import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { itemOf } from '../../bench/items.ts'
import { closedLoop } from '../../bench/load/closed-loop.ts'

/** A server that counts what it is asked, and answers by `answer`. */
async function serve(t: Test, answer: (id: number, response: ServerResponse) => void) {
  const asked: number[] = []
  const server = createServer((request, response) => {
    const id = Number(request.url?.split('/').at(-1))
    asked.push(id)
    answer(id, response)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => server.close())
  return { asked, port: (server.address() as AddressInfo).port }
}

const LOAD = { subject: 'read', clients: 4, warmUpMillis: 50, millis: 200, round: 1 } as const

t.test('everything that was asked is waited for, checked and added up', async (t) => {
  const { asked, port } = await serve(t, (id, response) => response.end(JSON.stringify(itemOf(id))))
  const outcome = await closedLoop({ ...LOAD, port })
  t.equal(outcome.asked, asked.length)
  t.equal(outcome.answered, asked.length)
  t.equal(outcome.right, asked.length)
  t.equal(
    outcome.sum,
    asked.reduce((sum, id) => sum + id, 0),
  )
  t.ok(outcome.perSecond > 0 && (outcome.perSecond * LOAD.millis) / 1000 < asked.length, 'the warm-up is not counted')
  t.ok(outcome.times.every((millis) => millis > 0))
  t.equal(outcome.complaint, undefined)
})

t.test('a wrong answer is not taken for a right one', async (t) => {
  const { port } = await serve(t, (id, response) => response.end(JSON.stringify(itemOf(id === 65 ? 66 : id))))
  const outcome = await closedLoop({ ...LOAD, port, round: 0, clients: 64 })
  t.ok(outcome.right < outcome.answered)
  t.match(outcome.complaint, 'GET /items/65 answered 200 {"id":66')
})

t.test('nor is one with another status', async (t) => {
  const { port } = await serve(t, (id, response) => response.writeHead(500).end(JSON.stringify(itemOf(id))))
  const outcome = await closedLoop({ ...LOAD, port })
  t.equal(outcome.right, 0)
  t.match(outcome.complaint, / answered 500 /)
})
