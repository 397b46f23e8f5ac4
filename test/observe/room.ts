import { largestFit, neededBy } from '../../lib/observe/room.ts'
import { test } from '../support/test.ts'

test('all pools together can come to hold size and overflow of each', async (t) => {
  t.equal(neededBy({ processes: 3, size: 8, maxOverflow: 4 }), 36)
})

test('the largest pool that fits is the largest: it fits, and with one connection more each it would not', async (t) => {
  const wrong: object[] = []
  for (const processes of [1, 2, 7]) {
    for (const maxOverflow of [0, 4]) {
      for (let room = processes; room < 60; room++) {
        const fleet = { processes, size: 50, maxOverflow }
        const fit = largestFit(fleet, room)!
        const needed = neededBy({ processes, ...fit })
        const isLargest = fit.size >= 1 && needed <= room && needed + processes > room
        if (!isLargest) wrong.push({ ...fleet, room, fit })
      }
    }
  }
  t.strictSame(wrong, [])
})

test('the overflow is kept as long as one connection is left beside it', async (t) => {
  const fleet = { processes: 2, size: 16, maxOverflow: 4 }
  t.strictSame(largestFit(fleet, 21), { size: 6, maxOverflow: 4 })
  t.strictSame(largestFit(fleet, 10), { size: 1, maxOverflow: 4 })
  t.strictSame(largestFit(fleet, 9), { size: 4, maxOverflow: 0 })
  t.equal(largestFit(fleet, 1), undefined, 'not one each')
})
