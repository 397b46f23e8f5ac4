import { summarize } from '../../lib/observe/summary.ts'
import { test } from '../support/test.ts'

/* What a statement is called where many of a kind have to have one name. */
const said: Record<string, string> = {
  'select * from "trips" where "id" = $1': 'SELECT trips',
  'select * from "public"."trips" as "t" inner join "users" as "u" on "u"."id" = "t"."user"':
    'SELECT public.trips users',
  'insert into "trips" ("note") values ($1) on conflict do update set "note" = $2 returning *': 'INSERT trips',
  'update "trips" set "note" = $1': 'UPDATE trips',
  'update only trips set note = $1': 'UPDATE trips',
  'delete from "trips" where "id" in (select "id" from "old")': 'DELETE trips',
  'merge into a using b on a.x = b.x when matched then update set y = 1': 'MERGE a',
  'with recent as (select * from trips) select * from recent': 'SELECT recent',
  'with recursive a as (select 1) insert into "log" select * from a': 'INSERT log a',
  '(select 1 from a) union (select 2 from b)': 'SELECT',
  'select * from (select * from trips) t': 'SELECT',
  'select extract(epoch from "at") from lateral (select 1) x, y': 'SELECT',
  'select a is distinct from b from c': 'SELECT c',
  'select * from a for update skip locked': 'SELECT a',
  "select 'it''s from x' from y": 'SELECT y',
  "select E'it\\'s from x' from y": 'SELECT y',
  'select $$ from x $$, $q$ from $$ x $q$ from y where z = $1': 'SELECT y',
  '-- from x\n/* from x */ select 1 from y': 'SELECT y',
  'savepoint "x"': 'SAVEPOINT',
  'truncate trips': 'TRUNCATE',
  'select pg_sleep(1)': 'SELECT',
  '': '',
  ';;': '',
}

test('verb and tables are what a statement is called', async (t) => {
  for (const [statement, text] of Object.entries(said)) {
    t.equal(summarize(statement).text, text, statement)
    t.equal(summarize(statement).operation, text.split(' ')[0])
  }
})

test('a statement of any length is read in no time, and its name is short', async (t) => {
  const values = Array.from({ length: 50_000 }, (_, index) => `($${index + 1})`).join(', ')
  t.equal(summarize(`insert into "notes" ("note") values ${values}`).text, 'INSERT notes')
  t.equal(summarize(`select * from "${'x'.repeat(500)}"`).text.length, 255)
  for (const nasty of ["'".repeat(1e6), '"'.repeat(1e6), '/*'.repeat(1e6), '$a$'.repeat(1e6), 'a.'.repeat(1e6)]) {
    const since = performance.now()
    summarize(nasty)
    t.ok(performance.now() - since < 200)
  }
})

test('statements made up one by one are still of one kind', async (t) => {
  const names = new Set(Array.from({ length: 2000 }, (_, index) => summarize(`select ${index} from "trips"`).text))
  t.strictSame([...names], ['SELECT trips'])
})
