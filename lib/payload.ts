import { validateHeaderName, validateHeaderValue } from 'node:http'
import type { FastifyReply } from 'fastify'

/** A web `Response`, whoever has made it. */
export function isWebResponse(payload: unknown): payload is Response {
  return Object.prototype.toString.call(payload) === '[object Response]'
}

/** Read when the body is written, which is after onSend: the session must still be there. */
export function isStream(payload: unknown): boolean {
  if (typeof payload !== 'object' || payload === null) return false
  if (isWebResponse(payload)) return payload.body !== null
  return 'pipe' in payload || 'getReader' in payload
}

/** Whether Fastify can write the answer. It finds out after onSend, which would be after COMMIT. */
export function isSendable(payload: unknown, reply: FastifyReply): boolean {
  const { statusCode, raw } = reply
  if (raw.headersSent || statusCode < 100 || statusCode > 999) return false
  // Fastify drops what a status has no body for before it looks at it.
  const isBodyless = payload === undefined || payload === null || statusCode < 200 || statusCode === 204
  const isBody = isBodyless || typeof payload === 'string' || Buffer.isBuffer(payload)
  if (!isBody && !isStream(payload) && !isWebResponse(payload)) return false
  // HTTP/2 drops a header that it cannot send.
  if ('stream' in raw) return true
  try {
    const headers = reply.getHeaders()
    for (const name in headers) {
      validateHeaderName(name)
      const value = headers[name]
      if (!Array.isArray(value)) validateHeaderValue(name, String(value))
      else for (const one of value) validateHeaderValue(name, String(one))
    }
    return true
  } catch {
    // Fastify will come to the same verdict and report it.
    return false
  }
}
