import t from 'tap'
import { now, Queue, type Waiter } from '../../lib/pool/queue.ts'
import { eventually } from '../support/eventually.ts'

type Log = (string | [string, string])[]

/** A waiter that writes down what becomes of it. */
class Guest implements Waiter<string> {
  readonly name: string
  readonly #log: Log
  onGranted = () => {}
  waitedMillis: number | undefined

  constructor(name: string, log: Log) {
    this.name = name
    this.#log = log
  }

  granted(left: string | undefined): void {
    this.#log.push(left === undefined ? this.name : [this.name, left])
    this.onGranted()
  }

  refused(why: string, waitedMillis: number): void {
    this.#log.push([this.name, why])
    this.waitedMillis = waitedMillis
  }
}

function setUp(options: { capacity?: number; timeoutMillis?: number; maxWaiting?: number } = {}) {
  const log: Log = []
  const queue = new Queue<string>({ capacity: 1, timeoutMillis: 10_000, maxWaiting: 100, ...options })
  const enter = (name: string): Guest => {
    const guest = new Guest(name, log)
    queue.enter(guest)
    return guest
  }
  /** What happened since the last look. */
  const happened = () => log.splice(0)
  return { queue, enter, happened }
}

t.test('grants as many slots as there are, and no more', async (t) => {
  const { queue, enter, happened } = setUp({ capacity: 2 })
  for (const name of ['a', 'b', 'c']) enter(name)
  t.strictSame(happened(), ['a', 'b'])
  t.equal(queue.taken, 2)
  t.equal(queue.waiting, 1)
  queue.leave()
  t.strictSame(happened(), ['c'])
  t.equal(queue.taken, 2, 'the slot went from hand to hand')
  queue.leave()
  queue.leave()
  t.equal(queue.taken, 0)
  t.equal(queue.waiting, 0)
})

t.test('serves in the order of coming, whoever comes in between', async (t) => {
  const { queue, enter, happened } = setUp()
  enter('holder')
  for (const name of ['1', '2', '3']) enter(name).onGranted = () => void enter(`after ${name}`)
  happened()
  for (let i = 0; i < 6; i++) queue.leave()
  t.strictSame(happened(), ['1', '2', '3', 'after 1', 'after 2', 'after 3'])
})

t.test('passes on what is left in a slot, and keeps the slot taken where nobody waits', async (t) => {
  const { queue, enter, happened } = setUp()
  enter('holder')
  enter('waiter')
  happened()
  t.equal(queue.pass('a thing'), true)
  t.strictSame(happened(), [['waiter', 'a thing']])
  t.equal(queue.pass('a thing'), false)
  t.equal(queue.taken, 1)
  queue.leave()
  t.equal(queue.taken, 0)
})

t.test('a waiter that leaves is forgotten, wherever it stands', async (t) => {
  const { queue, enter, happened } = setUp()
  const holder = enter('holder')
  const [a, b, c] = ['a', 'b', 'c'].map(enter) as [Guest, Guest, Guest]
  happened()
  t.equal(queue.cancel(b), true)
  t.equal(queue.cancel(b), false)
  t.equal(queue.cancel(holder), false, 'it has a slot, it does not wait')
  t.equal(queue.waiting, 2)
  t.equal(queue.cancel(a), true)
  queue.leave()
  t.strictSame(happened(), ['c'])
  t.equal(queue.cancel(c), false)
})

t.test('more than may wait are refused at once', async (t) => {
  const { queue, enter, happened } = setUp({ maxWaiting: 2 })
  for (const name of ['holder', 'a', 'b', 'c']) enter(name)
  t.strictSame(happened(), ['holder', ['c', 'saturated']])
  queue.leave()
  enter('d')
  t.strictSame(happened(), ['a'], 'there is room again')
  t.equal(queue.waiting, 2)
})

t.test('maxWaiting 0 and timeoutMillis 0 refuse whoever would have to wait', async (t) => {
  for (const [options, why] of [
    [{ maxWaiting: 0 }, 'saturated'],
    [{ timeoutMillis: 0 }, 'timeout'],
  ] as const) {
    const { queue, enter, happened } = setUp(options)
    enter('holder')
    t.equal(enter('a').waitedMillis, 0)
    t.strictSame(happened(), ['holder', ['a', why]])
    t.equal(queue.waiting, 0)
    queue.leave()
    enter('b')
    t.strictSame(happened(), ['b'])
  }
})

t.test('a closed queue refuses who waits and who would have to, and still gives out what is free', async (t) => {
  const { queue, enter, happened } = setUp({ capacity: 2 })
  for (const name of ['a', 'b', 'c', 'd']) enter(name)
  queue.close()
  enter('e')
  t.strictSame(happened(), ['a', 'b', ['c', 'closed'], ['d', 'closed'], ['e', 'closed']])
  t.equal(queue.waiting, 0)
  queue.leave()
  enter('f')
  t.strictSame(happened(), ['f'])
})

t.test('a closed queue spares who is to be spared', async (t) => {
  const { queue, enter, happened } = setUp()
  for (const name of ['holder', 'a', 'spared']) enter(name)
  queue.close((waiter) => (waiter as Guest).name.startsWith('spared'))
  enter('b')
  enter('spared too')
  t.strictSame(happened(), ['holder', ['a', 'closed'], ['b', 'closed']])
  queue.leave()
  queue.leave()
  t.strictSame(happened(), ['spared', 'spared too'])
})

t.test('each waiter is refused when its own time is up, never earlier', async (t) => {
  const { queue, enter } = setUp({ timeoutMillis: 60 })
  enter('holder')
  const guests: Guest[] = []
  const enough = new Promise<void>((resolve) => {
    const more = setInterval(() => {
      guests.push(enter(`guest ${guests.length}`))
      if (guests.length < 10) return
      clearInterval(more)
      resolve()
    }, 7)
  })
  await enough
  const last = guests.at(-1)!
  await eventually(() => last.waitedMillis !== undefined)
  for (const { name, waitedMillis } of guests) {
    t.ok(waitedMillis! >= 60, `${name} waited ${waitedMillis} ms`)
    t.ok(waitedMillis! < 400, `${name} waited ${waitedMillis} ms`)
  }
  t.equal(queue.waiting, 0)
  t.equal(queue.taken, 1)
})

t.test('a timer that fires early refuses nobody early', async (t) => {
  const { queue, enter, happened } = setUp({ timeoutMillis: 50 })
  enter('holder')
  const guest = enter('guest')
  happened()
  // The clock the queue measures by stands still meanwhile, as if the timer had been in a hurry.
  const stopped = performance.now()
  const { now: real } = performance
  t.teardown(() => {
    performance.now = real
  })
  performance.now = () => stopped + 49.5
  await new Promise((done) => setTimeout(done, 80))
  t.equal(guest.waitedMillis, undefined)
  performance.now = real
  await eventually(() => queue.waiting === 0)
  t.strictSame(happened(), [['guest', 'timeout']])
})

t.test('an app that computes past the deadline gives what comes back meanwhile a chance', async (t) => {
  const { queue, enter, happened } = setUp({ timeoutMillis: 20 })
  enter('holder')
  enter('guest')
  happened()
  // What a socket brings is read after timers have run and before setImmediate: here it comes in that gap.
  await new Promise<void>((done) => {
    setTimeout(() => {
      for (const until = now() + 40; now() < until; );
      setTimeout(() => {
        queue.leave()
        done()
      }, 0)
    }, 0)
  })
  t.match(happened()[0], 'guest')
})

t.test('nobody who waits keeps the timer when the last one has left', async (t) => {
  const { queue, enter, happened } = setUp({ timeoutMillis: 30 })
  enter('holder')
  const first = enter('first')
  queue.cancel(first)
  const second = enter('second')
  happened()
  await eventually(() => second.waitedMillis !== undefined)
  t.ok(second.waitedMillis! >= 30, 'it is measured from its own coming')
  t.strictSame(happened(), [['second', 'timeout']])
})

t.test('ten thousand waiters are served, and leave from the middle, in no time', async (t) => {
  const { queue, enter, happened } = setUp({ maxWaiting: 20_000 })
  enter('holder')
  const guests = Array.from({ length: 10_000 }, (_, i) => enter(String(i)))
  const since = now()
  for (const [i, guest] of guests.entries()) if (i % 2 === 1) queue.cancel(guest)
  for (let i = 0; i < 5000; i++) queue.leave()
  t.ok(now() - since < 2000)
  t.strictSame(happened().slice(1, 4), ['0', '2', '4'])
  t.equal(queue.waiting, 0)
})

t.test('whoever is late already when the next one is looked at is refused, with no timer into the past', async (t) => {
  const { queue, enter, happened } = setUp({ timeoutMillis: 20 })
  enter('holder')
  const first = enter('first')
  const since = now()
  while (now() - since < 10);
  enter('second')
  happened()
  const timers = t.capture(globalThis, 'setTimeout', setTimeout)
  first.refused = () => {
    // What a refusal sets off takes its time.
    const began = now()
    while (now() - began < 60);
  }
  await eventually(() => queue.waiting === 0)
  t.strictSame(happened(), [['second', 'timeout']])
  t.strictSame(
    timers().filter(({ args }) => Number(args[1]) < 0),
    [],
  )
})
