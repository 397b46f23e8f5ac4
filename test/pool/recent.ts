import t from 'tap'
import { Recent } from '../../lib/pool/recent.ts'

const who = (route: string, method = 'GET') => ({ method, route, requestId: '1' })

t.test('sums are kept by route and method', async (t) => {
  const recent = new Recent(1000, 0)
  recent.add(who('/a'), 10, 4, 1, 100)
  recent.add(who('/a'), 20, 6, 2, 200)
  recent.add(who('/a', 'POST'), 1, 1, 1, 300)
  recent.refuse(400)
  t.strictSame(
    { ...recent.read(500), routes: recent.read(500).routes.map((route) => ({ ...route })) },
    {
      routes: [
        { method: 'GET', route: '/a', count: 2, heldMillis: 30, busyMillis: 10, statements: 3 },
        { method: 'POST', route: '/a', count: 1, heldMillis: 1, busyMillis: 1, statements: 1 },
      ],
      refused: 1,
      millis: 500,
      longestMillis: new Map(),
    },
  )
})

t.test('what is older than two windows is forgotten', async (t) => {
  const recent = new Recent(1000, 0)
  recent.add(who('/a'), 10, 4, 1, 500)
  recent.add(who('/b'), 10, 4, 1, 1500)
  t.strictSame(
    recent.read(1600).routes.map(({ route }) => route),
    ['/a', '/b'],
  )
  t.equal(recent.read(1600).millis, 1600)
  t.strictSame(
    recent.read(2600).routes.map(({ route }) => route),
    ['/b'],
  )
  t.strictSame(recent.read(9000), { routes: [], refused: 0, millis: 1, longestMillis: new Map() })
})

t.test('the longest hold of a route is kept for longer, where it was long', async (t) => {
  const recent = new Recent(1000, 0)
  for (const millis of [900, 3000, 1000]) recent.add(who('/a'), millis, 0, 1, 500)
  recent.add(who('/b'), 20, 0, 1, 500)
  t.strictSame([...recent.read(90_000).longestMillis], [['GET /a', 3000]])
})

t.test('of a hold that was longer than two windows, two windows count', async (t) => {
  const recent = new Recent(1000, 0)
  recent.add(who('/a'), 20_000, 10_000, 1, 100)
  t.match(recent.read(200).routes, [{ heldMillis: 2000, busyMillis: 1000 }])
})
