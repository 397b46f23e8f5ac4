import type { Session } from 'fastify-request-db'
import pg from 'pg'
import { SEATS_LEFT_CHECK } from '../tables.ts'

export interface Route {
  from: string
  to: string
}

export class NoSuchFlight extends Error {
  constructor({ from, to }: Route) {
    super(`There is no flight from ${from} to ${to}`)
  }
}

export class SoldOut extends Error {
  constructor({ from, to }: Route) {
    super(`The flight from ${from} to ${to} is sold out`)
  }
}

/** Takes one seat and returns the flight's id. When it throws, the transaction, or the savepoint, is spent. */
export async function takeSeat(session: Session, route: Route): Promise<number> {
  try {
    const flight = await session
      .updateTable('flights')
      .set((eb) => ({ seats_left: eb('seats_left', '-', 1) }))
      .where('origin', '=', route.from)
      .where('destination', '=', route.to)
      .returning('id')
      .executeTakeFirst()
    if (!flight) throw new NoSuchFlight(route)
    return flight.id
  } catch (error) {
    if (error instanceof pg.DatabaseError && error.constraint === SEATS_LEFT_CHECK) throw new SoldOut(route)
    throw error
  }
}

export async function giveSeatBack(session: Session, flightId: number): Promise<void> {
  await session
    .updateTable('flights')
    .set((eb) => ({ seats_left: eb('seats_left', '+', 1) }))
    .where('id', '=', flightId)
    .execute()
}

/** A flight with seats left, LHR to JFK if it can be, and a small plane that goes on from there. */
export async function suggestRoutes(session: Session): Promise<Route[]> {
  const first = await session
    .selectFrom('flights')
    .select(['origin as from', 'destination as to'])
    .where('seats_left', '>', 0)
    .orderBy((eb) => eb.and([eb('origin', '=', 'LHR'), eb('destination', '=', 'JFK')]), 'desc')
    .orderBy('seats_left', 'desc')
    .executeTakeFirstOrThrow()
  const second = await session
    .selectFrom('flights')
    .select(['origin as from', 'destination as to'])
    .where('origin', '=', first.to)
    .orderBy('seats_left')
    .orderBy('destination')
    .executeTakeFirstOrThrow()
  return [first, second]
}
