import t, { type Test } from 'tap'
import { nothingIsLeft } from './nothing-left.ts'
import { leftOutBecause } from './through-pooler.ts'

/** `t.test` of the file's own `t`, or of a given one, that also asserts at the end that nothing is left behind. */
export async function test(name: string, body: (t: Test) => Promise<void>, parent: Test = t): Promise<void> {
  const skip = leftOutBecause(name)
  if (skip !== undefined) {
    parent.skip(`${name} (${skip})`, () => {})
    return
  }
  await parent.test(name, async (child) => {
    await body(child)
    await nothingIsLeft(child)
  })
}

export { type Test, t }
