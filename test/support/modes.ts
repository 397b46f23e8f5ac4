import type { CommitOn } from '../../lib/index.ts'
import type { Database } from './database.ts'
import { notesIn } from './notebook.ts'
import { nothingIsLeft } from './nothing-left.ts'
import { type Test, test } from './test.ts'

export const MODES: readonly CommitOn[] = ['onSend', 'onResponse']

/** A test that is run in both commit modes, each time on an empty table `notes`. */
export function inBothModes(database: Database, name: string, body: (t: Test, commitOn: CommitOn) => Promise<void>) {
  for (const commitOn of MODES) {
    void test(`${name} (${commitOn})`, async (t) => {
      await database.query('delete from notes')
      await body(t, commitOn)
    })
  }
}

/** Asserts what the table holds when all has come to rest: these notes, in this order, and no others. */
export async function holds(t: Test, database: Database, notes: readonly string[]): Promise<void> {
  await nothingIsLeft(t)
  t.strictSame(await notesIn(database), notes, `the table holds [${notes}]`)
}
