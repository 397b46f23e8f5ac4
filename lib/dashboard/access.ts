import type { FastifyRequest } from 'fastify'

const LOCAL_PEERS = /^(127\.\d+\.\d+\.\d+|::1|::ffff:127\.\d+\.\d+\.\d+)$/
const LOCAL_HOSTS = /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/i
const PROXYS = /^(x-forwarded-.*|forwarded|via|x-real-ip)$/

/**
 * Somebody at this machine itself. The socket decides, not `request.ip`, which a header can set. A proxy here speaks for
 * somebody elsewhere; and a page from elsewhere, whose name was made to lead here, comes with its own name as the host.
 */
export function isLocal({ raw }: FastifyRequest): boolean {
  const { headers, socket } = raw
  const isProxied = Object.keys(headers).some((name) => PROXYS.test(name))
  const host = headers.host ?? headers[':authority']
  return !isProxied && LOCAL_PEERS.test(socket.remoteAddress ?? '') && LOCAL_HOSTS.test(String(host))
}
