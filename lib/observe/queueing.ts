// Arrivals at random (Poisson), holds of random length (exponential), one queue in order, and nobody waits for longer
// than the timeout: the queue M/M/c+D. Erlang's formulas are its two ends, C without a timeout and B with a timeout of 0.

/** Connections, and what is asked of them. */
export interface Load {
  /** Connections that serve one queue: `size + maxOverflow` of one process. */
  readonly servers: number
  /** Sessions per second that ask for one. */
  readonly ratePerSecond: number
  /** How long a session holds one, on average. */
  readonly holdMillis: number
  /** After so long a session that waits is refused. */
  readonly timeoutMillis: number
}

/** What becomes of such a load in the long run. Durations in milliseconds, shares from 0 to 1. */
export interface Expectation {
  /** Connections asked for at once, on average, by Little's law: rate x hold. From `servers` on it is too much. */
  readonly offered: number
  /** The share of the time for which a connection is held. */
  readonly utilization: number
  /** The share of sessions that find no free connection. */
  readonly waitProbability: number
  /** Of all sessions: those that do not wait count as 0, those that are refused as `timeoutMillis`. */
  readonly meanWaitMillis: number
  /** 19 of 20 sessions wait no longer than this. */
  readonly p95WaitMillis: number
  /** The share of sessions that are refused after `timeoutMillis`. */
  readonly timeoutShare: number
}

/** The share of sessions that may wait where waiting is called rare. */
export const RARELY = 0.05
// Beyond this Erlang's recursion takes long, and the square root rule is right to a connection or two in a hundred thousand.
const MANY = 100_000
const SQUARE_ROOT_RULE = 1.75

/** What a pool does under a load. All numbers are positive, `timeoutMillis` may be 0. */
export function expect({ servers, ratePerSecond, holdMillis, timeoutMillis }: Load): Expectation {
  const offered = (ratePerSecond * holdMillis) / 1000
  // Times in units of the mean hold from here on: the connections together finish `servers` sessions per unit.
  const patience = timeoutMillis / holdMillis
  const { free, within, beyond, mean } = weigh(servers, offered, patience)
  const all = free + within + beyond
  const timeoutShare = beyond / all
  const waitProbability = (within + beyond) / all
  return {
    offered,
    utilization: (offered * (1 - timeoutShare)) / servers,
    waitProbability,
    meanWaitMillis: ((mean + patience * beyond) / all) * holdMillis,
    p95WaitMillis: quantile(RARELY, waitProbability, timeoutShare, (servers - offered) * patience) * timeoutMillis,
    timeoutShare,
  }
}

/**
 * What a session that arrives meets, in proportion: a free connection, a wait `within` its patience, one `beyond` it;
 * and the waits within it, summed up. The time until a connection is free has the density b c e^(-dx) up to the
 * patience, where b is the weight of 'all are held' against 'one is free' and d what is left over of the connections'
 * speed; beyond it, where nobody new queues up, it falls with e^(-cx).
 */
function weigh(servers: number, offered: number, patience: number) {
  const full = 1 / freeAgainstFull(servers, offered)
  const decay = (servers - offered) * patience
  // Overloaded, the weights grow beyond all numbers: then all are divided by the largest.
  const scale = decay < 0 ? Math.exp(decay) : 1
  const left = decay < 0 ? 1 : Math.exp(-decay)
  return {
    free: scale,
    within: full * servers * patience * ratio(decay, scale, left),
    beyond: full * left,
    mean: full * servers * patience * patience * meanRatio(decay, scale, left),
  }
}

// (1 - e^-z) / z and (1 - e^-z (1 + z)) / z², times `scale`, where left = e^-z times `scale`. Near 0 by their series.
const ratio = (z: number, scale: number, left: number) =>
  Math.abs(z) < 1e-4 ? scale * (1 - z / 2) : (scale - left) / z
const meanRatio = (z: number, scale: number, left: number) =>
  Math.abs(z) < 1e-4 ? scale * (1 / 2 - z / 3) : (scale - left * (1 + z)) / (z * z)

/** Which share of the patience all but `rest` of the sessions wait at most. */
function quantile(rest: number, waitProbability: number, timeoutShare: number, decay: number): number {
  if (waitProbability <= rest) return 0
  if (timeoutShare >= rest) return 1
  // Of those that wait within their patience, the share that waits longer than the quantile.
  const longer = (rest - timeoutShare) / (waitProbability - timeoutShare)
  if (Math.abs(decay) < 1e-4) return 1 - longer
  const left = Math.exp(-Math.abs(decay))
  // Seen from the end where the density is highest, so that nothing is lost in a difference of large numbers.
  if (decay > 0) return -Math.log(left + longer * (1 - left)) / decay
  return 1 - Math.log(left + (1 - longer) * (1 - left)) / decay
}

/** Erlang's recursion, in the form in which neither factorials nor powers overflow: p(less than n held) / p(n held). */
function freeAgainstFull(servers: number, offered: number): number {
  let against = 0
  for (let n = 1; n <= servers; n++) against = nextAgainst(against, n, offered)
  return against
}
const nextAgainst = (against: number, n: number, offered: number) => (n / offered) * (1 + against)

// Erlang C: the share that waits where nobody is refused.
function waitShare(against: number, servers: number, offered: number): number {
  if (offered >= servers) return 1
  const waiting = servers / (servers - offered) / against
  return waiting / (1 + waiting)
}

/** The smallest number of connections with which waiting is rare: not one session in twenty finds none free. */
export function serversFor(ratePerSecond: number, holdMillis: number): number {
  const offered = (ratePerSecond * holdMillis) / 1000
  if (!(offered > 0)) return 1
  if (offered > MANY) return Math.ceil(offered + SQUARE_ROOT_RULE * Math.sqrt(offered))
  let against = 0
  for (let servers = 1; ; servers++) {
    against = nextAgainst(against, servers, offered)
    if (waitShare(against, servers, offered) <= RARELY) return servers
  }
}

/** The longest mean hold, in milliseconds, with which so many connections keep waiting as rare as `serversFor`. */
export function holdFor(servers: number, ratePerSecond: number): number {
  let enough = 0
  let tooMuch = servers
  for (let step = 0; step < 50; step++) {
    const offered = (enough + tooMuch) / 2
    if (waitShare(freeAgainstFull(servers, offered), servers, offered) <= RARELY) enough = offered
    else tooMuch = offered
  }
  return (enough * 1000) / ratePerSecond
}
