import { existsSync } from 'node:fs'

/**
 * The tests of one file cover that file: test/pool/queue.ts is for lib/pool/queue.ts. A test without such a twin is for
 * its folder's: test/pool/dead-connections.ts for lib/pool, test/lifecycle/client-leaves.ts for what a request's end
 * goes through. What a scenario happens to run through is no merit of its tests.
 */
export default function covers(test) {
  const twin = test.replace(/^test\//, 'lib/')
  if (existsSync(twin)) return twin
  const folder = twin.slice(0, twin.lastIndexOf('/'))
  if (folder === 'lib') return null
  if (folder === 'lib/lifecycle') return ['lib/lifecycle.ts', 'lib/request-session.ts']
  return existsSync(folder) ? `${folder}/*.ts` : null
}
