import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import t, { type Test } from 'tap'
import { itemOf } from '../../bench/items.ts'
import { openLoop } from '../../bench/load/open-loop.ts'

async function serve(t: Test, answer: (id: number, response: ServerResponse) => void): Promise<number> {
  const server = createServer((request, response) => {
    answer(Number(request.url?.match(/\d+/)), response)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return (server.address() as AddressInfo).port
}

const right = (id: number, response: ServerResponse) => response.end(JSON.stringify(itemOf(id)))
const LOAD = { subject: 'held', perSecond: 200, warmUpMillis: 50, millis: 250 } as const
/** 200 in a second, 250 ms long, and one more for both ends. */
const ASKED = 51

t.test('requests go out when they are due, also when nothing is answered', async (t) => {
  const asked: number[] = []
  const port = await serve(t, (id) => asked.push(id))
  const outcome = await openLoop({ ...LOAD, port })
  t.ok(asked.length > ASKED, 'the warm-up, too')
  t.ok(Math.abs(outcome.asked - ASKED) <= 1, `${outcome.asked} of them count`)
  t.equal(outcome.served.length, 0)
  t.equal(outcome.wrong, 0, 'what is given up at the end is not wrong')
})

t.test('answers and refusals are kept apart', async (t) => {
  const port = await serve(t, (id, response) => {
    if (id % 4 === 0) right(id, response)
    else response.writeHead(503).end('{}')
  })
  const { asked, served, refused, wrong } = await openLoop({ ...LOAD, port })
  t.equal(wrong, 0)
  t.ok(served.length > 0 && refused.length > 2 * served.length)
  // What was asked in the warm-up may be answered after it.
  t.ok(served.length + refused.length <= asked + 1 + (LOAD.perSecond * LOAD.warmUpMillis) / 1000)
  t.ok([...served, ...refused].every((millis) => millis > 0))
})

t.test('a wrong answer is wrong', async (t) => {
  const port = await serve(t, (id, response) => right(id === 7 ? 8 : id, response))
  const { wrong, complaint } = await openLoop({ ...LOAD, port })
  t.equal(wrong, 1)
  t.match(complaint, 'GET /items/7/held answered 200 {"id":8')
})
