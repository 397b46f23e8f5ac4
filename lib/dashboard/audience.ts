import type { FastifyReply, FastifyRequest } from 'fastify'

const MOST_PAGES = 20

interface Page {
  readonly response: FastifyReply['raw']
  /** It has not read what it was sent. */
  isLate: boolean
  /** Of the reports it was sent last. */
  version: number
}

/** The open pages. One that does not read what it is sent is sent no more until it does. */
export class Audience {
  readonly #pages = new Set<Page>()
  readonly #onChange: (isWatched: boolean) => void
  #isClosed = false

  constructor(onChange: (isWatched: boolean) => void) {
    this.#onChange = onChange
  }

  get isFull(): boolean {
    return this.#isClosed || this.#pages.size >= MOST_PAGES
  }

  add(request: FastifyRequest, reply: FastifyReply): void {
    reply.hijack()
    const response = reply.raw
    const page: Page = { response, isLate: false, version: -1 }
    response.on('error', () => {})
    response.on('drain', () => {
      page.isLate = false
    })
    response.on('close', () => this.#left(page))
    response.writeHead(200, {
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
      'cross-origin-resource-policy': 'same-origin',
      'x-accel-buffering': 'no',
      // The end of the stream is the end of the connection, so that it does not keep the server from closing.
      ...(request.raw.httpVersionMajor === 1 && { connection: 'close' }),
    })
    response.write('retry: 2000\n\n')
    this.#pages.add(page)
    if (this.#pages.size === 1) this.#onChange(true)
  }

  /** `extra` is for those that do not have its `version` yet. */
  send(update: object, extra: { readonly version: number; read(): object }): void {
    const text = `data: ${JSON.stringify(update)}\n\n`
    let more: string | undefined
    for (const page of this.#pages) {
      if (page.isLate) continue
      if (page.version !== extra.version) {
        more ??= `event: reports\ndata: ${JSON.stringify(extra.read())}\n\n`
        page.version = extra.version
        page.response.write(more)
      }
      page.isLate = !page.response.write(text)
    }
  }

  /** Ends all, for good. */
  close(): void {
    this.#isClosed = true
    for (const page of this.#pages) {
      const { response, isLate } = page
      if (isLate) response.destroy()
      else response.end()
      this.#left(page)
    }
  }

  #left(page: Page): void {
    if (this.#pages.delete(page) && this.#pages.size === 0) this.#onChange(false)
  }
}
