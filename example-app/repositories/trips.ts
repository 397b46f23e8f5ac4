import type { Session } from 'fastify-request-db'
import { jsonArrayFrom } from 'kysely/helpers/postgres'
import { noteInAudit } from './audit.ts'
import { giveSeatBack, type Route, SoldOut, takeSeat } from './flights.ts'
import { enqueueMail } from './jobs.ts'

export interface Booking {
  passenger: string
  email: string
  legs: LegWish[]
}

/** A leg that is sold out fails the trip, unless it is optional: then the trip goes without it. */
export interface LegWish extends Route {
  optional?: boolean
}

export class NoSuchTrip extends Error {
  constructor(id: number) {
    super(`There is no trip ${id}`)
  }
}

/** A trip and the legs it had to leave out. All of it is booked, or nothing. */
export async function bookTrip(session: Session, { passenger, email, legs }: Booking) {
  const { id } = await session
    .insertInto('trips')
    .values({ passenger, email })
    .returning('id')
    .executeTakeFirstOrThrow()
  const skipped: Route[] = []
  for (const { position, leg } of inLockingOrder(legs)) {
    if (!(await bookLeg(session, id, position, leg))) skipped.push({ from: leg.from, to: leg.to })
  }
  if (skipped.length === legs.length) throw new SoldOut(legs[0]!)
  return { ...(await getTrip(session, id)), skipped }
}

/** Everybody locks flights in the same order, so that no two trips wait for each other. */
function inLockingOrder(legs: LegWish[]): { position: number; leg: LegWish }[] {
  const key = ({ leg }: { leg: LegWish }) => leg.from + leg.to
  return legs
    .map((leg, index) => ({ position: index + 1, leg }))
    .sort((a, b) => (key(a) < key(b) ? -1 : Number(key(a) > key(b))))
}

/** False for an optional leg that is sold out. */
async function bookLeg(session: Session, tripId: number, position: number, leg: LegWish): Promise<boolean> {
  const book = async () => {
    const flightId = await takeSeat(session, leg)
    session.add(session.insertInto('legs').values({ trip_id: tripId, position, flight_id: flightId }))
  }
  if (!leg.optional) {
    await book()
    return true
  }
  try {
    // A statement that fails spoils its transaction. With a savepoint around it, only what came after that.
    await session.transaction().execute(book)
    return true
  } catch (error) {
    if (error instanceof SoldOut) return false
    throw error
  }
}

/** Gives the seats back. A trip that is cancelled already stays as it is. */
export async function cancelTrip(session: Session, id: number) {
  const cancelled = await session
    .updateTable('trips')
    .set({ status: 'cancelled' })
    .where('id', '=', id)
    .where('status', '=', 'booked')
    .returning(['id', 'email'])
    .executeTakeFirst()
  if (cancelled) {
    // A mail that must not be lost, as one sent after the commit could be: it is a row, for the worker.
    enqueueMail(session, { to: cancelled.email, subject: `Your trip ${id} is cancelled` })
    await noteInAudit(`trip ${id} cancelled`)
    const flights = await session
      .selectFrom('legs')
      .innerJoin('flights', 'flights.id', 'legs.flight_id')
      .select('flights.id')
      .where('legs.trip_id', '=', id)
      // The order of bookTrip.
      .orderBy('flights.origin')
      .orderBy('flights.destination')
      .execute()
    for (const flight of flights) await giveSeatBack(session, flight.id)
  }
  return getTrip(session, id)
}

export async function getTrip(session: Session, id: number) {
  const trip = await trips(session).where('trips.id', '=', id).executeTakeFirst()
  if (!trip) throw new NoSuchTrip(id)
  return trip
}

/** The latest first: those before the trip `before`, which is the last one of the previous page. */
export function listTrips(session: Session, limit: number, before?: number) {
  return trips(session)
    .$if(before !== undefined, (query) => query.where('trips.id', '<', before ?? 0))
    .orderBy('trips.id', 'desc')
    .limit(limit)
    .execute()
}

/** Every trip, through a cursor: however many there are, only a few are in memory at a time. */
export function streamTrips(session: Session) {
  return trips(session).orderBy('trips.id').stream(100)
}

export type Trip = Awaited<ReturnType<typeof getTrip>>

function trips(session: Session) {
  return session
    .selectFrom('trips')
    .select((eb) => [
      'trips.id',
      'trips.passenger',
      'trips.email',
      'trips.status',
      'trips.booked_at as bookedAt',
      jsonArrayFrom(
        eb
          .selectFrom('legs')
          .innerJoin('flights', 'flights.id', 'legs.flight_id')
          .select(['flights.origin as from', 'flights.destination as to'])
          .whereRef('legs.trip_id', '=', 'trips.id')
          .orderBy('legs.position'),
      ).as('legs'),
    ])
}
