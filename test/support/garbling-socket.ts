import { Socket } from 'node:net'

/** A socket on which the next BEGIN arrives, once `garble()` was called, as something PostgreSQL does not know. */
export function garblingSocket(): { socket: Socket; garble(): void } {
  const socket = new Socket()
  const write = socket.write.bind(socket) as (...args: unknown[]) => boolean
  let armed = false
  const garbled = (chunk: unknown, ...rest: unknown[]) => {
    const at = armed && Buffer.isBuffer(chunk) ? chunk.indexOf('BEGIN\0') : -1
    if (at !== -1) {
      armed = false
      ;(chunk as Buffer).write('BEGAN', at)
    }
    return write(chunk, ...rest)
  }
  // Not earlier: connect() puts Node's own write back.
  socket.once('connect', () => Object.assign(socket, { write: garbled }))
  const garble = () => {
    armed = true
  }
  return { socket, garble }
}
