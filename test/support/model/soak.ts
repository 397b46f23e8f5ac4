import { setTimeout as pause } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import fc from 'fast-check'
import { createDatabase } from '../database.ts'
import { MODES } from '../modes.ts'
import { ownServer } from '../server.ts'
import { t } from '../test.ts'
import { scenario } from './program.ts'
import { DEEDS, Stage } from './stage.ts'

// `npm run soak -- --minutes 10`: the model's scenarios for as long as is asked for, on a server that is also restarted
// and killed. The rules are the model's; and nothing may grow.

const { values } = parseArgs({ options: { minutes: { type: 'string', default: '1' }, seed: { type: 'string' } } })
const minutes = Number(values.minutes)
const seed = Number(values.seed ?? Math.trunc(Math.random() * 2 ** 31))
const RESTART_EVERY_MILLIS = 15_000
const MEASURES = 12
// The pool's, and the two of the proxy.
const SOCKETS_OF_ONE = 3

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

interface Measure {
  readonly heapMegabytes: number
  /** Beyond the sockets of open connections. */
  readonly handles: number
  readonly listeners: number
  readonly backends: number
}

t.setTimeout((minutes + 5) * 60_000)
await t.test(`${minutes} minutes, seed ${seed}`, async (t) => {
  const server = await ownServer(t)
  const database = await createDatabase(t, { server, sql: DEEDS })
  const stages = await Promise.all(
    MODES.flatMap((commitOn) =>
      (['rollback', 'discard'] as const).map((resetOnReturn) =>
        Stage.open(t, database, commitOn, { resetOnReturn, preparedStatements: { cacheSize: 20 } }),
      ),
    ),
  )
  const rejections: unknown[] = []
  process.on('unhandledRejection', (reason) => void rejections.push(reason))

  const measure = async (): Promise<Measure> => {
    for (const stage of stages) stage.forget()
    await pause(200)
    for (let round = 0; round < 4; round++) {
      collect()
      await pause(10)
    }
    const backends = (await database.backends()).length
    return {
      heapMegabytes: Math.round(process.memoryUsage().heapUsed / 1e4) / 100,
      handles: process.getActiveResourcesInfo().length - SOCKETS_OF_ONE * backends,
      listeners: process.eventNames().reduce((sum, name) => sum + process.listenerCount(name), 0),
      backends,
    }
  }

  const crash = async () => {
    await server.kill()
    await server.start()
  }

  const until = performance.now() + minutes * 60_000
  const measures: Measure[] = []
  let played = 0
  let restarts = 0
  let restartAt = performance.now() + RESTART_EVERY_MILLIS
  let measureAt = 0
  for (let batch = 0; performance.now() < until; batch++) {
    if (performance.now() >= measureAt) {
      const measured = await measure()
      measures.push(measured)
      t.comment(`${played} scenarios, ${restarts} restarts: ${JSON.stringify(measured)}`)
      measureAt = performance.now() + (minutes * 60_000) / MEASURES
    }
    const isRestarting = performance.now() >= restartAt
    const restart = isRestarting ? pause(50).then(() => (restarts++ % 2 === 0 ? server.restart() : crash())) : undefined
    const scenarios = fc.sample(scenario, { seed: seed + batch, numRuns: 20 })
    const complaints = await Promise.all(
      stages.map(async (stage) => {
        const all: string[] = []
        for (const one of scenarios) all.push(...(await stage.play(one, !isRestarting)))
        return all
      }),
    )
    await restart
    if (isRestarting) restartAt = performance.now() + RESTART_EVERY_MILLIS
    played += scenarios.length * stages.length
    const all = [...complaints.flat(), ...rejections.splice(0).map((reason) => `unhandled: ${reason}`)]
    if (all.length > 0) t.fail(`${all.join('\n')}\nseed ${seed}, batch ${batch}`)
  }
  t.comment(`${played} scenarios, ${restarts} restarts: ${JSON.stringify(await measure())}`)
  const third = Math.floor(measures.length / 3)
  const mean = (some: readonly Measure[], name: keyof Measure) =>
    some.reduce((sum, one) => sum + one[name], 0) / some.length
  const mostOpen = stages.reduce((sum, { app }) => sum + app.db.snapshot().size, 0)
  for (const { backends } of measures) t.ok(backends <= mostOpen, `${backends} backends of ${mostOpen} at most`)
  for (const name of ['heapMegabytes', 'handles', 'listeners'] as const) {
    const [before, after] = [mean(measures.slice(1, 1 + third), name), mean(measures.slice(-third), name)]
    t.ok(
      after <= before * 1.15 + 2,
      `${name}: ${before.toFixed(1)} in the first third, ${after.toFixed(1)} in the last`,
    )
  }
})
