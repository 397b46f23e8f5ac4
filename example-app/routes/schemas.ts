// Pieces of JSON schema that several routes share.

/** Begins with something to see, and has no control characters: PostgreSQL's text cannot hold a NUL. */
export const text = (maxLength: number) => ({ type: 'string', maxLength, pattern: '^[^\\s\\p{Cc}]\\P{Cc}*$' })

/** As big as PostgreSQL's integer goes. */
export const id = { type: 'integer', minimum: 1, maximum: 2147483647 }

export const limit = { type: 'integer', minimum: 1, maximum: 100, default: 20 }

/** The code of an airport. */
export const iata = { type: 'string', pattern: '^[A-Z0-9]{3}$' }
