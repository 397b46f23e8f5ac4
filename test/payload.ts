import { Readable } from 'node:stream'
import type { FastifyReply } from 'fastify'
import t from 'tap'
import { isSendable, isStream, isWebResponse } from '../lib/payload.ts'

t.test('a stream is what is read after onSend', async (t) => {
  const streams = [Readable.from([]), new ReadableStream(), new Response('text'), new Response(new ReadableStream())]
  t.ok(streams.every(isStream))
  const others = [undefined, null, 'text', Buffer.from('text'), { ok: true }, 1, new Response(null)]
  t.notOk(others.some(isStream))
})

t.test('a web Response is one by what it says it is', async (t) => {
  t.ok(isWebResponse(new Response('text')))
  t.notOk(isWebResponse({ status: 200, body: null }))
})

t.test('what Fastify cannot write is not to be committed for', async (t) => {
  const reply = (statusCode: number, headers: object = {}, raw: object = { headersSent: false }) =>
    ({ statusCode, raw, getHeaders: () => headers }) as unknown as FastifyReply
  for (const payload of ['text', Buffer.from('x'), new Response('x'), Readable.from([])]) {
    t.ok(isSendable(payload, reply(200)))
  }
  t.ok(isSendable(undefined, reply(204)))
  t.ok(isSendable({ dropped: true }, reply(204)))
  t.notOk(isSendable({ unserialized: true }, reply(200)))
  t.notOk(isSendable('text', reply(99)))
  t.notOk(isSendable('text', reply(1000)))
  t.notOk(isSendable('text', reply(200, {}, { headersSent: true })))
  t.notOk(isSendable('text', reply(200, { 'x-bad': 'line\nbreak' })))
  t.notOk(isSendable('text', reply(200, { 'x-bad': ['fine', 'line\nbreak'] })))
  t.ok(
    isSendable('text', reply(200, { 'x-bad': 'line\nbreak' }, { headersSent: false, stream: {} })),
    'HTTP/2 drops it',
  )
})
