import type { Session } from 'fastify-request-db'
import { sql } from 'kysely'

/** Airports whose code, name or city has `text` in it; the code itself first, then cities of that name. */
export function searchAirports(session: Session, text: string, limit: number) {
  const pattern = `%${text.replace(/[\\%_]/g, '\\$&')}%`
  return session
    .selectFrom('airports')
    .select(['iata', 'name', 'city', 'country'])
    .where((eb) =>
      eb.or([eb('iata', '=', text.toUpperCase()), eb('name', 'ilike', pattern), eb('city', 'ilike', pattern)]),
    )
    .orderBy((eb) => eb('iata', '=', text.toUpperCase()), 'desc')
    .orderBy((eb) => eb(sql`lower(city)`, '=', text.toLowerCase()), 'desc')
    .orderBy('name')
    .limit(limit)
    .execute()
}
