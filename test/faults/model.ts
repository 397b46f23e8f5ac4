import fc from 'fast-check'
import { createDatabase } from '../support/database.ts'
import { type Scenario, scenario } from '../support/model/program.ts'
import { DEEDS, Stage } from '../support/model/stage.ts'
import { MODES } from '../support/modes.ts'
import { t, test } from '../support/test.ts'

/*
 * Random programs of handler steps, several at a time on a pool too small for them, under random faults, against a plain
 * model of what must be in the table and what clients may have been told. What is acknowledged is there; what is not,
 * and was not committed by hand, is not, unless the answer was COMMIT_UNKNOWN; a transaction is kept as a whole or not
 * at all, and in one transaction of the server; nothing is held afterwards.
 *
 * MODEL_RUNS and MODEL_SEED in the environment choose how many and which.
 */

const RUNS = Number(process.env.MODEL_RUNS ?? 600)
const SEED = Number(process.env.MODEL_SEED ?? Math.trunc(Math.random() * 2 ** 31))
t.setTimeout(60_000 + RUNS * 200)

const database = await createDatabase(t, { sql: DEEDS })
t.comment(`MODEL_SEED=${SEED}`)

for (const commitOn of MODES) {
  for (const resetOnReturn of ['rollback', 'discard'] as const) {
    test(`${RUNS} scenarios (${commitOn}, ${resetOnReturn})`, async (t) => {
      const stage = await Stage.open(t, database, commitOn, { resetOnReturn })
      const rejections: unknown[] = []
      const reject = (reason: unknown) => void rejections.push(reason)
      process.on('unhandledRejection', reject)
      t.teardown(() => void process.off('unhandledRejection', reject))
      const property = fc.asyncProperty(scenario, async (played: Scenario) => {
        const complaints = await stage.play(played)
        if (rejections.length > 0) complaints.push(`unhandled: ${rejections.splice(0)}`)
        if (complaints.length > 0) throw new Error(complaints.join('\n'))
      })
      const { failed, seed, counterexample, errorInstance } = await fc.check(property, {
        numRuns: RUNS,
        seed: SEED,
        // Timing is a part of it: a smaller one that fails is good luck.
        endOnFailure: true,
      })
      t.notOk(failed, `${errorInstance}\nMODEL_SEED=${seed}\n${JSON.stringify(counterexample, undefined, 2)}`)
    })
  }
}
