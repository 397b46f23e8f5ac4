import type { RequestDbOptions, SessionOptions } from '../../../lib/index.ts'
import { buildApp } from '../../support/app.ts'
import { createDatabase } from '../../support/database.ts'
import { add, notesIn } from '../../support/notebook.ts'
import { startProxy } from '../../support/proxy.ts'
import { NOTES } from '../../support/schema.ts'
import { t, test } from '../../support/test.ts'

/* What decides over rows and cannot be what it seems to be stops the request: nobody's tenant is not everybody's. */

const database = await createDatabase(t, { sql: NOTES })
t.beforeEach(() => database.query('delete from notes'))

type Settings = NonNullable<RequestDbOptions['settings']>

const NONE: [string, unknown][] = [
  ['a promise', Promise.resolve({ 'app.tenant': 'acme' })],
  ['nothing', undefined],
  ['null', null],
  ['a map', new Map([['app.tenant', 'acme']])],
  ['a list', ['app.tenant', 'acme']],
  ['a text', 'acme'],
  ['an object that inherits them', Object.create({ 'app.tenant': 'acme' })],
]

for (const [what, value] of NONE) {
  test(`settings that are ${what} stop the request, and nothing is sent`, async (t) => {
    const proxy = await startProxy(t, database.connectionString)
    const settings = (() => value) as Settings
    const app = await buildApp(t, database, { connectionString: proxy.connectionString, settings }, (app) => {
      app.post('/', async ({ db }) => void (await add(db, 'of nobody')))
    })
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.equal(answer.json().code, 'FST_REQUEST_DB_INVALID_OPTION')
    t.strictSame(proxy.statements(), [])
    t.strictSame(await notesIn(database), [])
  })

  if (value === undefined) continue
  test(`a session with settings that are ${what} is refused`, async (t) => {
    const app = await buildApp(t, database)
    const used = app.db.session({ settings: value } as SessionOptions, (db) => add(db, 'of nobody'))
    await t.rejects(used, { code: 'FST_REQUEST_DB_INVALID_OPTION' })
    t.strictSame(await notesIn(database), [])
  })
}

for (const value of [['acme', 'other'], { tenant: 'acme' }, Object.create(null), null, undefined, Symbol('acme')]) {
  test(`a tenant that is ${typeof value} stops the request, and the answer does not repeat it`, async (t) => {
    const settings = (() => ({ 'app.tenant': value })) as Settings
    const app = await buildApp(t, database, { settings }, (app) => {
      app.post('/', async ({ db }) => void (await add(db, 'of nobody')))
    })
    const answer = await app.inject({ method: 'POST', url: '/' })
    t.equal(answer.json().code, 'FST_REQUEST_DB_INVALID_OPTION')
    t.notMatch(answer.body, /acme/)
    t.strictSame(await notesIn(database), [])
  })
}

test('settings without a prototype, and those of a class, are settings', async (t) => {
  class Tenant {
    'app.tenant' = 'acme'
    toString() {
      return 'a tenant'
    }
  }
  const answers = [Object.assign(Object.create(null), { 'app.tenant': 'acme' }), new Tenant()]
  const settings = (() => answers.pop()) as Settings
  const proxy = await startProxy(t, database.connectionString)
  const app = await buildApp(t, database, { connectionString: proxy.connectionString, settings }, (app) => {
    app.post('/', async ({ db }) => void (await add(db, 'of acme')))
  })
  for (const _ of [1, 2]) t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.equal(proxy.statements().filter(([, text]) => text?.includes('set_config')).length, 2)
  t.strictSame(await notesIn(database), ['of acme', 'of acme'])
})

test('a shouldCommit that returns a promise, which would be true in any case, commits nothing', async (t) => {
  const shouldCommit = (async () => false) as unknown as () => boolean
  const app = await buildApp(t, database, { shouldCommit }, (app) => {
    app.post('/', async ({ db }) => void (await add(db, 'unwanted')))
  })
  const answer = await app.inject({ method: 'POST', url: '/' })
  t.equal(answer.statusCode, 500)
  t.equal(answer.json().code, 'FST_REQUEST_DB_INVALID_OPTION')
  t.strictSame(await notesIn(database), [])
})
