import { behindPooler } from './behind-pooler.ts'
import type { Verdict } from './cause.ts'
import { holdAndWait } from './causes/hold-and-wait.ts'
import { leak } from './causes/leak.ts'
import { lockWait } from './causes/lock-wait.ts'
import { lookAtServer } from './causes/server.ts'
import { heldIdle, poolTooSmall, slowSql } from './causes/use.ts'
import type { Facts } from './facts.ts'

/** The first cause that fits; undefined where nothing is to be changed. */
export function diagnose(facts: Facts): Verdict | undefined {
  if (facts.code === 'FST_REQUEST_DB_POOL_CLOSED') return undefined
  const verdict = firstThatFits(facts)
  return facts.pooler ? behindPooler(verdict) : verdict
}

function firstThatFits(facts: Facts): Verdict {
  for (const look of [lookAtServer, holdAndWait, leak, lockWait, slowSql, heldIdle]) {
    const verdict = look(facts)
    if (verdict !== undefined) return verdict
  }
  return poolTooSmall(facts)
}
