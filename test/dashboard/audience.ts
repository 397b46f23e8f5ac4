import { setImmediate } from 'node:timers/promises'
import Fastify, { type FastifyReply } from 'fastify'
import { Audience } from '../../lib/dashboard/audience.ts'
import { openHttp } from '../support/http-client.ts'
import { test } from '../support/test.ts'

const nothing = { version: 0, read: () => ({}) }
const megabyte = { text: 'x'.repeat(2 ** 20) }

test('a page that does not read is sent no more, and is not waited for in the end', async (t) => {
  const changes: boolean[] = []
  const audience = new Audience((isWatched) => changes.push(isWatched))
  const app = Fastify()
  t.teardown(() => app.close())
  let response: FastifyReply['raw'] | undefined
  app.get('/', (request, reply) => {
    response = reply.raw
    audience.add(request, reply)
  })
  const deaf = await openHttp(t, app)
  deaf.send('GET', '/')
  await deaf.receives('retry: 2000')
  deaf.pause()
  for (let update = 0; update < 50; update++) {
    audience.send(megabyte, nothing)
    await setImmediate()
  }
  const kept = response?.writableLength ?? 0
  t.ok(kept > 0 && kept < 2 ** 22, `${kept} bytes are kept for it`)
  audience.close()
  await app.close()
  t.strictSame(changes, [true, false])
})
