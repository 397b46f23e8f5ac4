import Fastify from 'fastify'
import { checkObserverOptions, decoratorCheck, poolOf } from '../../lib/observe/registration.ts'
import { test } from '../support/test.ts'

/* How a plugin that looks at a pool finds it, and refuses what it cannot use. */
test('the pool is found under the decorator it is registered with', async (t) => {
  const app = Fastify()
  const pool = { name: 'reports', snapshot: () => {} }
  app.decorate('reports', { pool })
  app.decorate('cache', { pool: {} })
  t.equal(poolOf(app, 'reports'), pool)
  for (const name of ['db', 'cache', 'toString']) {
    t.throws(() => poolOf(app, name), { code: 'FST_REQUEST_DB_INVALID_OPTION', message: new RegExp(`got '${name}'`) })
  }
})

test('options are checked by name, and those of Fastify let through', async (t) => {
  const checks = { decorator: decoratorCheck }
  checkObserverOptions({ decorator: 'db', prefix: '/x', logLevel: 'warn' }, checks)
  checkObserverOptions({ decorator: undefined }, checks)
  const refused: [object, RegExp][] = [
    [{ toString: 1 }, /toString: expected one of decorator, got an unknown name/],
    [{ decorator: '1x' }, /decorator: expected a name, got '1x'/],
    [{ decorator: null }, /got null/],
    [{ decorator: {} }, /got a value of type object/],
  ]
  for (const [options, message] of refused) {
    t.throws(() => checkObserverOptions(options, checks), { code: 'FST_REQUEST_DB_INVALID_OPTION', message })
  }
})
