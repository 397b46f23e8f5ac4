import type { FastifyBaseLogger } from 'fastify'
import type { ObservedPool, Who } from '../../lib/observe/snapshot.ts'
import { Ledger, type Party } from '../../lib/pool/ledger.ts'

const ignore = () => {}

/** A log for what nobody looks at. */
export const deafLog = { info: ignore, warn: ignore, error: ignore, debug: ignore } as unknown as FastifyBaseLogger

/** Somebody who asks for a connection outside of any known request. */
export const partyOf = (who: Who): Party => ({ who, log: deafLog, origin: undefined })

/** A ledger of a pool that nobody needs. */
export function openLedger(): Ledger {
  const pool: ObservedPool = {
    name: 'db',
    snapshot() {
      throw new Error('nobody asks')
    },
  }
  return new Ledger(pool, deafLog, { leakDetectionMillis: false, windowMillis: 1000 })
}
