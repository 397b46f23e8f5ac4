import { setTimeout as sleep } from 'node:timers/promises'

/**
 * Asks again and again until the answer is yes. The one place that waits: a test that needs something 'within a
 * second' says so with a deadline, and goes on the moment it is so.
 */
export async function isSoWithin(millis: number, isSo: () => boolean | Promise<boolean>): Promise<boolean> {
  const deadline = performance.now() + millis
  while (!(await isSo())) {
    if (performance.now() > deadline) return false
    await sleep(10)
  }
  return true
}

/** As `isSoWithin`, but throws what `describe` says where the answer stays no. */
export async function eventually(
  isSo: () => boolean | Promise<boolean>,
  options: { withinMillis?: number; describe?: () => string } = {},
): Promise<void> {
  const { withinMillis = 10_000, describe = () => `not so within ${withinMillis} ms: ${isSo}` } = options
  if (!(await isSoWithin(withinMillis, isSo))) throw new Error(describe())
}
