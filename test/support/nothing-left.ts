import type { Test } from 'tap'
import type { Snapshot } from '../../lib/index.ts'
import type { Backend, Database } from './database.ts'
import { isSoWithin } from './eventually.ts'

/** An app whose pool and backends are looked at after every test. */
export interface WatchedApp {
  readonly database: Database
  /** Its application_name. */
  readonly application: string
  readonly snapshot: () => Snapshot
}

const watched = new Set<WatchedApp>()
const warnings: Error[] = []

process.on('warning', (warning) => {
  // What Node says of its own experiments is no news about the plugin.
  if (warning.name !== 'ExperimentalWarning') warnings.push(warning)
})

/** From now to the end of `t`, `nothingIsLeft` looks at this app too. */
export function watchApp(t: Test, app: WatchedApp): void {
  watched.add(app)
  t.teardown(() => watched.delete(app))
}

export const watchedApps = (): WatchedApp[] => [...watched]

/**
 * Asserts what must hold a moment after any test: nobody has a connection or waits for one, no backend of the app is
 * active or in a transaction, and Node had nothing to warn of. `test()` asserts it at the end of each test.
 */
export async function nothingIsLeft(t: Test, withinMillis = 4000): Promise<void> {
  for (const app of watched) {
    let left: object | undefined
    await isSoWithin(withinMillis, async () => {
      left = await whatIsLeft(app)
      return left === undefined
    })
    if (left) t.fail(`${app.application} still holds something after ${withinMillis} ms`, left)
    else t.pass('nothing is held, nobody waits, no transaction is open on the server')
  }
  const warned = warnings.splice(0)
  if (warned.length > 0) t.fail('Node warned', { warnings: warned.map((warning) => warning.stack) })
}

/** Takes the warnings there were, so that a test that provokes one can look at it. */
export function takeWarnings(): Error[] {
  return warnings.splice(0)
}

/** What an app holds at this moment; undefined where it holds nothing. */
export async function whatIsLeft(app: WatchedApp): Promise<object | undefined> {
  const snapshot = app.snapshot()
  const { checkedOut, waiting, holders, waiters } = snapshot
  const backends = await busyBackends(app)
  const isClean = checkedOut + waiting + holders.length + waiters.length + backends.length === 0
  return isClean ? undefined : { snapshot, backends }
}

async function busyBackends({ database, application }: WatchedApp): Promise<Backend[]> {
  // A server that is down has no backends.
  const all = await database.backends(application).catch(() => [])
  return all.filter(({ state }) => state !== 'idle' && state !== null)
}
