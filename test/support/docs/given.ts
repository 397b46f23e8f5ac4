/** What a page takes for granted. */
interface Given {
  /** Tables that it uses without showing how they are made. */
  readonly sql?: string
  /** And their types. */
  readonly types?: string
  /** Variables of the environment; `{database}` stands for the address of the page's own. */
  readonly env?: Readonly<Record<string, string>>
  /** Why its modules are compiled, but not run. */
  readonly compiledOnly?: string
}

const schema = (tables: string) => `declare module 'fastify-request-db' { interface DatabaseSchema { ${tables} } }`

export const GIVEN: Readonly<Record<string, Given>> = {
  'README.md': {
    sql: 'create table trips (id serial primary key, note text not null); create table audit (url text, error text)',
    types: schema('audit: { url: string; error: string }'),
  },
  'docs/replica.md': {
    // A replica of its own would lag; the page's code works on the same rows.
    env: { REPLICA_URL: '{database}' },
  },
}
