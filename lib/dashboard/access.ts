import type { IncomingHttpHeaders } from 'node:http'
import type { FastifyRequest } from 'fastify'

const LOCAL_PEERS = /^(127\.\d+\.\d+\.\d+|::1|::ffff:127\.\d+\.\d+\.\d+)$/
const LOCAL_HOSTS = /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i
const PROXYS = /^(x-forwarded-.*|forwarded|via|x-real-ip)$/

/**
 * Somebody at this machine itself. The socket decides, not `request.ip`, which a header can set. A proxy here speaks for
 * somebody elsewhere; and a page from elsewhere, whose name was made to lead here, comes with its own name as the host.
 */
export function isLocal({ raw }: FastifyRequest): boolean {
  const { headers, socket, httpVersion } = raw
  // As it is installed, nginx says nothing of itself and gives the host a local name, but spoke HTTP/1.0 for 15 years.
  const isProxied = httpVersion === '1.0' || Object.keys(headers).some((name) => PROXYS.test(name))
  const host = String(headers.host ?? headers[':authority'])
  return (
    !isProxied &&
    LOCAL_PEERS.test(socket.remoteAddress ?? '') &&
    LOCAL_HOSTS.test(host) &&
    !isOfAnotherSite(headers, host)
  )
}

/** A page from elsewhere asks, in a browser of this machine: the app may allow all to read its answers (CORS). */
function isOfAnotherSite(headers: IncomingHttpHeaders, host: string): boolean {
  const { origin, 'sec-fetch-site': site, 'sec-fetch-mode': mode } = headers
  if (origin !== undefined && origin !== `http://${host}` && origin !== `https://${host}`) return true
  // Who follows a link from there may come.
  return (site === 'cross-site' || site === 'same-site') && mode !== 'navigate'
}
