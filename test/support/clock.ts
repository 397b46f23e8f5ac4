import type { Test } from 'tap'

/** The monotonic clock in a test's hand: `advance(millis)` is a wait that takes no time. Runs as ever after `t`. Timers are not affected. */
export function takeClock(t: Test): { advance(millis: number): void } {
  const { now } = performance
  let ahead = 0
  performance.now = () => now.call(performance) + ahead
  t.teardown(() => {
    performance.now = now
  })
  return {
    advance: (millis) => {
      ahead += millis
    },
  }
}
