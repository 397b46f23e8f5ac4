import type { Contender } from '../contender.ts'

/** Fastify with no database at all. */
const fastify: Contender = async () => undefined
export default fastify
