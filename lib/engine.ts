import type { FastifyBaseLogger } from 'fastify'
import type { EffectiveOptions } from './options.ts'
import { Pool } from './pool/pool.ts'

/** What a registration of the plugin works with. SQLAlchemy: `Engine`. */
export class Engine {
  readonly options: EffectiveOptions
  readonly log: FastifyBaseLogger
  /** Where sessions take their connections from now on. Tests of apps put one of their own here for a while. */
  pool: Pool
  readonly #own: Pool

  constructor(options: EffectiveOptions, log: FastifyBaseLogger) {
    this.options = options
    this.log = log
    this.#own = new Pool(options.pool, log)
    this.pool = this.#own
  }

  /** Back to the registration's own pool. */
  restore(): void {
    this.pool = this.#own
  }

  startClosing(): void {
    for (const pool of new Set([this.#own, this.pool])) pool.startClosing()
  }

  async close(): Promise<void> {
    await Promise.all([...new Set([this.#own, this.pool])].map((pool) => pool.close()))
  }
}
