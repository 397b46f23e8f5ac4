import { currentScope, enter, isFollowed, nest, outside, type Scope, Scopes } from '../../lib/session/scope.ts'
import { t } from '../support/test.ts'

/** Something scopes can belong to. */
class Owner {
  readonly scopes: Scopes<Owner> = new Scopes<Owner>(this, 20)

  get root(): Scope<Owner> {
    return this.scopes.root
  }
}
const CONFLICT = { code: 'FST_REQUEST_DB_NESTED_CONFLICT' }

t.test('the innermost scope may act, the others wait until it is theirs', async (t) => {
  const { scopes, root } = new Owner()
  t.equal(scopes.top, root)
  t.equal(scopes.turn(root), undefined)
  const inner = scopes.push('savepoint', true)
  t.equal(scopes.turn(inner), undefined)
  const waiting = scopes.turn(root)
  scopes.pop(inner)
  await waiting
  t.equal(scopes.turn(root), undefined)
})

t.test('names differ, so that no savepoint is taken for another', async (t) => {
  const { scopes } = new Owner()
  t.not(scopes.push('savepoint', true).name, scopes.push('savepoint', true).name)
})

t.test('nobody acts while COMMIT or ROLLBACK is under way', async (t) => {
  const { scopes, root } = new Owner()
  scopes.lock()
  t.equal(scopes.locked, true)
  const waiting = scopes.turn(root)
  scopes.unlock()
  await waiting
  t.equal(scopes.locked, false)
})

t.test('who waits for too long is refused', async (t) => {
  const { scopes, root } = new Owner()
  scopes.push('savepoint', true)
  await t.rejects(async () => scopes.turn(root), CONFLICT)
})

t.test('who waits when all is over is refused with the reason', async (t) => {
  const { scopes, root } = new Owner()
  scopes.push('savepoint', true)
  const waiting = scopes.turn(root)
  scopes.refuseAll(() => new Error('the end'))
  await t.rejects(async () => waiting, { message: 'the end' })
})

t.test('where a handle drives the innermost scope nobody waits: the others are refused at once', async (t) => {
  const { scopes, root } = new Owner()
  const controlled = scopes.push('savepoint', false)
  t.throws(() => scopes.turn(root), CONFLICT)
  t.equal(scopes.turn(controlled), undefined)
})

t.test('a scope that has ended, and the time of the raw client, take no statements', async (t) => {
  const { scopes } = new Owner()
  const ended = scopes.push('savepoint', true)
  scopes.pop(ended)
  t.throws(() => scopes.turn(ended), CONFLICT)
  t.throws(() => scopes.turn(scopes.push('client', true)), CONFLICT)
})

t.test('the end of a scope ends what is still open in it, and is no harm twice', async (t) => {
  const { scopes, root } = new Owner()
  const outer = scopes.push('savepoint', true)
  const inner = scopes.push('savepoint', true)
  scopes.pop(outer)
  scopes.pop(inner)
  t.strictSame([outer.open, inner.open, root.open], [false, false, true])
  t.equal(scopes.top, root)
})

t.test('reset ends everything but the session itself', async (t) => {
  const { scopes, root } = new Owner()
  const inner = scopes.push('savepoint', true)
  scopes.push('client', true)
  scopes.reset()
  t.equal(inner.open, false)
  t.equal(scopes.top, root)
  t.strictSame(root.kept, [])
})

t.test("callbacks of the raw client's time go to the scope around it", async (t) => {
  const { scopes, root } = new Owner()
  t.equal(scopes.accountable(root), root)
  const savepoint = scopes.push('savepoint', true)
  const client = scopes.push('client', true)
  t.equal(scopes.accountable(client), savepoint)
  t.equal(scopes.accountable(savepoint), savepoint)
})

t.test('what runs in a chain of awaits belongs to the scope that was entered in it', async (t) => {
  const owner = new Owner()
  const other = new Owner()
  const inner = owner.scopes.push('savepoint', true)
  t.equal(currentScope(owner), owner.root)
  t.equal(isFollowed(owner), false)
  const beside = new Promise<void>((resolve) => setImmediate(resolve)).then(() => currentScope(owner))
  await nest(owner, async () => {
    t.equal(isFollowed(owner), true)
    t.equal(isFollowed(other), false)
    t.equal(currentScope(owner), owner.root, 'nothing is entered yet')
    enter(other, other.root)
    enter(owner, inner)
    t.equal(isFollowed(owner), false)
    await new Promise((resolve) => setImmediate(resolve))
    t.equal(currentScope(owner), inner)
    t.equal(currentScope(other), other.root)
    t.equal(
      outside(() => currentScope(owner)),
      owner.root,
    )
    enter(owner, owner.root)
    t.equal(currentScope(owner), inner, 'the first one entered stays')
    await nest(other, async () => {
      enter(other, other.root)
      t.equal(currentScope(owner), inner, 'also behind the nesting of another')
    })
  })
  t.equal(await beside, owner.root)
  t.equal(currentScope(owner), owner.root)
})
