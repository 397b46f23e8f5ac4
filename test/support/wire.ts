/** PostgreSQL's protocol 3.0, as far as a proxy must read it. https://www.postgresql.org/docs/18/protocol-message-formats.html */

/** One message, with the bytes it came in. `type` is the protocol's letter, or the name of a first packet. */
export interface Message {
  readonly type: string
  readonly raw: Buffer
  readonly body: Buffer
}

export type StartupType = 'startup' | 'cancel' | 'ssl' | 'gssenc'

const STARTUP_CODES: Record<number, StartupType> = {
  80877102: 'cancel',
  80877103: 'ssl',
  80877104: 'gssenc',
}

/** Cuts a stream of bytes into messages. A frontend starts with packets that have no letter; a backend does not. */
export class MessageReader {
  #rest: Buffer = Buffer.alloc(0)
  #inStartup: boolean

  constructor(side: 'frontend' | 'backend') {
    this.#inStartup = side === 'frontend'
  }

  push(chunk: Buffer): Message[] {
    this.#rest = this.#rest.length === 0 ? chunk : Buffer.concat([this.#rest, chunk])
    const messages: Message[] = []
    for (let message = this.#next(); message; message = this.#next()) messages.push(message)
    return messages
  }

  #next(): Message | undefined {
    const header = this.#inStartup ? 4 : 5
    if (this.#rest.length < header) return undefined
    const length = this.#rest.readInt32BE(header - 4) + header - 4
    if (this.#rest.length < length) return undefined
    const raw = this.#rest.subarray(0, length)
    this.#rest = this.#rest.subarray(length)
    const body = raw.subarray(header)
    if (!this.#inStartup) return { type: String.fromCharCode(raw[0] ?? 0), raw, body }
    const type = STARTUP_CODES[body.readInt32BE(0)] ?? 'startup'
    // After a refused 'ssl' the client sends its startup packet, still without a letter.
    if (type === 'startup') this.#inStartup = false
    return { type, raw, body }
  }
}

/** Text up to the next zero byte, and what comes after it. */
function cString(body: Buffer, from = 0): [text: string, after: number] {
  const end = body.indexOf(0, from)
  const stop = end === -1 ? body.length : end
  return [body.toString('utf8', from, stop), stop + 1]
}

/** user, database, application_name and the other parameters of a startup packet. */
export function startupParameters(message: Message): Record<string, string> {
  const parameters: Record<string, string> = {}
  let at = 4
  while (at < message.body.length && message.body[at] !== 0) {
    const [name, afterName] = cString(message.body, at)
    const [value, afterValue] = cString(message.body, afterName)
    parameters[name] = value
    at = afterValue
  }
  return parameters
}

/** The backend a cancel request is for. */
export const cancelledPid = (message: Message): number => message.body.readInt32BE(4)

/** Name and text of a Parse. */
export function parsedStatement(message: Message): { name: string; text: string } {
  const [name, after] = cString(message.body)
  return { name, text: cString(message.body, after)[0] }
}

/** Name of the statement a Bind uses. */
export function boundStatement(message: Message): string {
  return cString(message.body, cString(message.body)[1])[0]
}

/** What is worth comparing in a message: a statement's text, a command's tag, an error's SQLSTATE, a status. */
export function textOf(message: Message, from: 'client' | 'server'): string {
  if (from === 'client') {
    if (message.type === 'P') return parsedStatement(message).text
    return message.type === 'Q' ? cString(message.body)[0] : ''
  }
  if (message.type === 'C') return cString(message.body)[0]
  if (message.type === 'Z') return String.fromCharCode(message.body[0] ?? 0)
  return message.type === 'E' ? (errorFields(message).C ?? '') : ''
}

/** The fields of an ErrorResponse by their letters: S severity, C SQLSTATE, M message. */
export function errorFields(message: Message): Record<string, string> {
  const fields: Record<string, string> = {}
  let at = 0
  while (at < message.body.length && message.body[at] !== 0) {
    const letter = String.fromCharCode(message.body[at] ?? 0)
    const [value, after] = cString(message.body, at + 1)
    fields[letter] = value
    at = after
  }
  return fields
}

/** An ErrorResponse of severity FATAL. */
export function fatalResponse(sqlState: string, text: string): Buffer {
  const fields = { S: 'FATAL', V: 'FATAL', C: sqlState, M: text }
  const body = Object.entries(fields).map(([letter, value]) => `${letter}${value}\0`)
  const payload = Buffer.from(`${body.join('')}\0`)
  const head = Buffer.alloc(5)
  head.write('E')
  head.writeInt32BE(payload.length + 4, 1)
  return Buffer.concat([head, payload])
}
