import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { createDatabase } from '../support/database.ts'

t.setTimeout(120_000)

t.test('demo:trace shows the life of a session in five cases', async (t) => {
  const { connectionString, rows } = await createDatabase(t)
  const { stdout } = await promisify(execFile)(process.execPath, ['--import=tsx', 'example-app/trace.ts'], {
    cwd: fileURLToPath(new URL('../..', import.meta.url)),
    env: { ...process.env, DATABASE_URL: connectionString },
  })
  // What is logged stands left, with the id of its request in front, and SQLAlchemy's right.
  const logged = stdout.matchAll(/^ {3}req-(\d)\s\s(connection 1 [a-z ]+?|[A-Z]+|insert|select)\b.*$/gm)
  const byRequest: string[][] = [[], [], [], [], []]
  for (const [, id, what = ''] of logged) byRequest[Number(id) - 1]?.push(what.replace('connection 1 ', ''))
  t.strictSame(byRequest, [
    ['checked', 'BEGIN', 'insert', 'COMMIT', 'returned'],
    ['checked', 'BEGIN', 'select', 'COMMIT', 'returned'],
    [],
    ['checked', 'BEGIN', 'insert', 'rollback', 'ROLLBACK', 'returned'],
    ['checked', 'BEGIN', 'SAVEPOINT', 'insert', 'RELEASE', 'COMMIT', 'returned'],
  ])
  t.match(stdout, /3\. a session that is never used\n(.*\n)+? {3}\(nothing\) +\(nothing\)\n/)
  t.equal((await rows('trips')).length, 2, 'the first and the last are kept')
})
