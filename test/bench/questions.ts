import t from 'tap'
import { fiveFrom, ITEMS, itemOf } from '../../bench/items.ts'
import { itemsOf } from '../../bench/load/closed-loop.ts'
import { question } from '../../bench/questions.ts'

t.test('an answer is right if it is that of the item that was asked for', async (t) => {
  const { path, isRight } = question('read', 17)
  t.equal(path, '/items/17')
  t.ok(isRight(JSON.stringify(itemOf(17))))
  t.notOk(isRight(JSON.stringify(itemOf(18))))
  t.notOk(isRight('{}'))
})

t.test('a count goes on where the last answer ended', async (t) => {
  const { isRight } = question('update', 5)
  const answer = (before: number, after: number, id = 5) => JSON.stringify({ id, before, after })
  t.ok(isRight(answer(41, 42)), 'whatever it was before')
  t.ok(isRight(answer(42, 43)))
  t.notOk(isRight(answer(42, 43)), 'an update that was acknowledged is gone')
  t.notOk(isRight(answer(43, 45)))
  t.notOk(isRight(answer(45, 46, 6)), 'of another item')
})

t.test('the five items are five, and exist', async (t) => {
  for (const id of [1, 2000, 2001, ITEMS]) {
    const ids = fiveFrom(id)
    t.equal(ids[0], id)
    t.equal(new Set(ids).size, 5)
    t.ok(ids.every((each) => each >= 1 && each <= ITEMS))
  }
})

t.test('every client has items of its own', async (t) => {
  for (const round of [0, 1, 100]) {
    const all = Array.from({ length: 64 }, (_, client) => itemsOf(client, { clients: 64, round })).flat()
    t.equal(new Set(all).size, all.length)
    t.ok(all.every((id) => id >= 1 && id <= ITEMS))
  }
})
