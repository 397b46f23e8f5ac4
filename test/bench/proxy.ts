import { once } from 'node:events'
import { type AddressInfo, connect, createServer } from 'node:net'
import t from 'tap'
import { Processes } from '../../bench/processes.ts'

const DELAY_MILLIS = 20
const LINES = 50

t.test('what goes through the proxy arrives as late as it should, whole and in order', async (t) => {
  const echo = createServer({ allowHalfOpen: true }, (socket) => socket.pipe(socket)).listen(0, '127.0.0.1')
  await once(echo, 'listening')
  t.teardown(() => echo.close())
  const processes = new Processes()
  t.teardown(() => processes.stop())
  const argument = { port: (echo.address() as AddressInfo).port, delayMillis: DELAY_MILLIS }
  const proxy = await processes.start<Record<string, never>, number>('./proxy.ts', argument)

  const socket = connect({ port: await proxy.ready, host: '127.0.0.1', noDelay: true })
  await once(socket, 'connect')
  const sentAt = performance.now()
  socket.write('hello')
  const [first] = await once(socket, 'data')
  t.equal(String(first), 'hello')
  t.ok(performance.now() - sentAt >= 2 * DELAY_MILLIS, 'once in each direction')

  let received = ''
  socket.setEncoding('utf8').on('data', (chunk) => {
    received += chunk
  })
  const lines = Array.from({ length: LINES }, (_, index) => `line ${index}\n`)
  for (const line of lines) {
    socket.write(line)
    await new Promise(setImmediate)
  }
  socket.end()
  await once(socket, 'end')
  t.equal(received, lines.join(''), 'the end comes behind everything that was sent before it')
})
