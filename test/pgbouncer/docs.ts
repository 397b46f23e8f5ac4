import { readFile } from 'node:fs/promises'
import { createDatabase } from '../support/database.ts'
import { startPgBouncer } from '../support/pgbouncer.ts'
import { bouncerTest, buildPooledApp } from '../support/pooled-app.ts'
import { t } from '../support/test.ts'

const database = await createDatabase(t)
const docs = await readFile(new URL('../../docs/pgbouncer.md', import.meta.url), 'utf8')

// These are of the place where it is installed.
const ELSEWHERE = new Set(['listen_port', 'auth_file'])

bouncerTest('the settings in docs/pgbouncer.md work as they stand', async (t) => {
  const ini = /```ini\n(.*?)```/s.exec(docs)?.[1] ?? ''
  const section = ini.split('[pgbouncer]\n')[1] ?? ''
  const lines = section.split('\n').filter((line) => line.includes(' = '))
  const settings = Object.fromEntries(lines.map((line) => line.split(' = ') as [string, string]))
  t.equal(settings.pool_mode, 'transaction')
  const bouncer = await startPgBouncer(
    t,
    database.connectionString,
    Object.fromEntries(Object.entries(settings).filter(([name]) => !ELSEWHERE.has(name))),
  )
  const app = await buildPooledApp(
    t,
    database,
    bouncer,
    { pool: { size: 20 }, statementTimeoutMillis: 10_000 },
    (app) => {
      app.get('/', ({ db }) => db.selectNoFrom(({ lit }) => lit(1).as('one')).execute())
    },
  )
  const answers = await Promise.all(Array.from({ length: 50 }, () => app.inject('/')))
  t.ok(answers.every(({ body }) => body === '[{"one":1}]'))
})
