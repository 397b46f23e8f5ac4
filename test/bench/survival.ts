import pg from 'pg'
import t, { type Test } from 'tap'
import { CONTENDERS, type ContenderName } from '../../bench/survival/contenders.ts'
import { type Seen, SURVIVES, verdictOf } from '../../bench/survival/judge.ts'
import { SCENARIOS } from '../../bench/survival/scenarios.ts'
import { trial } from '../../bench/survival/trial.ts'
import { SCHEMA } from '../../bench/survival/witness.ts'
import { sharedServer } from '../support/server.ts'

const ok = { status: 200, body: '' }
const failed = { status: 500, body: '' }
const calm: Seen = { deeds: [], complaints: [], notes: [], left: [], alive: true, next: ok }
const deed = { answer: ok, answered: 'ok', notes: ['a'] } as const

t.test('the answer and the rows are held against each other', async (t) => {
  const cases: [Partial<Seen>, string][] = [
    [{ deeds: [deed], notes: ['a'] }, SURVIVES],
    [{ deeds: [deed] }, '200 and no row'],
    [{ deeds: [{ ...deed, answer: failed, answered: 'error' }], notes: ['a'] }, 'commits a row it answered 500 for'],
    [{ deeds: [{ ...deed, answer: failed }] }, 'answers 500'],
    [{ deeds: [{ ...deed, answer: 'late' }] }, 'hangs'],
    [{ deeds: [{ ...deed, who: 'a neighbour', answer: failed }] }, 'a neighbour gets 500'],
    [{ alive: false }, 'the process dies'],
    [{ left: ['idle in transaction'] }, 'a transaction stays open'],
    [{ next: 'late' }, 'the next request hangs'],
  ]
  for (const [seen, expected] of cases) t.equal(verdictOf({ ...calm, ...seen }), expected)
})

t.test('a killed backend on a real server: one survives, one does not', async (t) => {
  const connectionString = await ownDatabase(t)
  const killed = SCENARIOS.find(({ name }) => name === 'backend killed while the handler works')
  const of = (name: ContenderName) => trial(connectionString, name, killed!)
  t.ok(Object.keys(CONTENDERS).length >= 4)
  t.equal(await of('ours'), SURVIVES)
  t.equal(await of('pg'), 'the process dies')
})

async function ownDatabase(t: Test): Promise<string> {
  const url = new URL(await sharedServer())
  const run = async (database: string, sql: string) => {
    const client = new pg.Client({ connectionString: Object.assign(new URL(url), { pathname: database }).href })
    await client.connect()
    await client.query(sql).finally(() => client.end())
  }
  const name = `survival_${process.pid}`
  await run('/postgres', `create database ${name}`)
  t.teardown(() => run('/postgres', `drop database ${name} with (force)`))
  await run(name, SCHEMA)
  return Object.assign(url, { pathname: name }).href
}
