import type { Generated, JSONColumnType } from 'kysely'
import type { Session } from '../../lib/index.ts'
import type { Database } from './database.ts'
import { oneRoute } from './one-route.ts'
import { type Test, test } from './test.ts'

/** Tables with enough in them for any query. */
export const ZOO = `
  create table people (
    id int generated always as identity primary key, name text not null unique, born int, tags text[] not null default '{}',
    profile jsonb not null default '{}'
  );
  create table pets (
    id int generated always as identity primary key, owner_id int references people on delete cascade,
    name text not null, species text not null, weight numeric(6, 2)
  );
  insert into people (name, born, tags, profile) values
    ('Ada', 1815, '{maths,poetry}', '{"city": "London", "langs": ["en", "fr"], "address": {"zip": "W1"}}'),
    ('Grace', 1906, '{navy}', '{"city": "New York", "langs": ["en"]}'),
    ('Linus', null, '{}', '{}');
  insert into pets (owner_id, name, species, weight) values
    (1, 'Dot', 'cat', 4.5), (1, 'Rex', 'dog', 20), (2, 'Moth', 'cat', 3.25), (null, 'Stray', 'dog', null);`

export type Zoo = {
  people: {
    id: Generated<number>
    name: string
    born: number | null
    tags: Generated<string[]>
    profile: JSONColumnType<{ city?: string; langs?: string[]; address?: { zip: string } }, string | undefined, string>
  }
  pets: {
    id: Generated<number>
    owner_id: number | null
    name: string
    species: string
    weight: string | number | null
  }
}

export type ZooSession = Session<Zoo>

/** Runs `fn` with the session of a request, and undoes what it did. */
export async function visit<T>(t: Test, database: Database, fn: (db: ZooSession) => Promise<T>): Promise<T> {
  let result: T | undefined
  const { post } = await oneRoute(t, database, async (db) => {
    result = await fn(db as unknown as ZooSession)
    await db.rollback()
    return 'ok'
  })
  const answer = await post()
  t.equal(answer.statusCode, 200, answer.body)
  return result as T
}

/** What a query answers, by its name. */
export type Cases = Record<string, [query: (db: ZooSession) => Promise<unknown>, answers: unknown]>

/** A test for each. */
export function answers(database: Database, cases: Cases): void {
  for (const [name, [query, expected]] of Object.entries(cases)) {
    void test(name, async (t) => {
      t.strictSame(await visit(t, database, query), expected)
    })
  }
}
