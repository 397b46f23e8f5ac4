import { type IncomingMessage, request } from 'node:http'

/** `none`: the connection was closed without one, or before its end. `late`: it did not come in time. */
export type Answer = { readonly status: number; readonly body: string } | 'none' | 'late'

/** One request on a connection of its own. */
export class Call {
  readonly answer: Promise<Answer>
  /** Resolves with the status when the body begins. */
  readonly begun: Promise<number>
  readonly #request

  constructor(port: number, method: 'GET' | 'POST', path: string, withinMillis: number) {
    const body = method === 'POST' ? '{}' : undefined
    const headers = body ? { 'content-type': 'application/json', 'content-length': body.length } : {}
    this.#request = request({ port, host: '127.0.0.1', method, path, headers, agent: false })
    let begin = (_status: number) => {}
    this.begun = new Promise((resolve) => {
      begin = resolve
    })
    this.answer = new Promise((resolve) => {
      const impatience = setTimeout(() => {
        resolve('late')
        this.leave()
      }, withinMillis)
      void this.#receive(begin).then((answer) => {
        clearTimeout(impatience)
        resolve(answer)
      })
    })
    this.#request.end(body)
  }

  /** The client goes away. */
  leave(): void {
    this.#request.destroy()
  }

  #receive(begin: (status: number) => void): Promise<Answer> {
    return new Promise((resolve) => {
      this.#request.on('error', () => resolve('none'))
      this.#request.on('response', (response: IncomingMessage) => {
        let body = ''
        response.setEncoding('utf8').on('data', (text: string) => {
          begin(response.statusCode ?? 0)
          body += text
        })
        response.on('error', () => {})
        response.on('close', () => resolve(response.complete ? { status: response.statusCode ?? 0, body } : 'none'))
      })
    })
  }
}
