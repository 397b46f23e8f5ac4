/** What is said on the page: durations, numbers, and in one word and one sentence how the pool is. */

export function duration(millis) {
  if (millis < 10) return `${millis.toFixed(1)} ms`
  if (millis < 1000) return `${Math.round(millis)} ms`
  if (millis < 10_000) return `${(millis / 1000).toFixed(1)} s`
  if (millis < 120_000) return `${Math.round(millis / 1000)} s`
  return `${Math.round(millis / 60_000)} min`
}

const whole = new Intl.NumberFormat('en', { maximumFractionDigits: 0 })
const tenth = new Intl.NumberFormat('en', { maximumFractionDigits: 1 })

export const number = (value) => whole.format(value)
export const rate = (value) => (value < 10 ? tenth : whole).format(value)

/** Who holds most, and what it does with it. */
function guilty({ holders, pool }) {
  const [most] = holders
  if (most === undefined) return ''
  const isAll = most.count === pool.checkedOut
  const whose = isAll ? 'All are' : `${number(most.count)} ${most.count === 1 ? 'is' : 'are'}`
  const mostly = most.busy === 0 || most.busy === most.count ? '' : 'most of them '
  const doing = most.busy * 2 > most.count ? 'busy in SQL' : 'idle in transaction'
  return `${whose} held by ${most.name}, ${mostly}${doing}, the oldest for ${duration(most.oldestMillis)}.`
}

/** `refused` is of the last ten seconds, `refusedNow` of the last two, `failed` of the last five. */
export function judge(update, { refused, refusedNow, failed }) {
  const { pool, waitersCount, waiters } = update
  const limit = pool.size + pool.maxOverflow
  const oldest = waiters.reduce((millis, group) => Math.max(millis, group.oldestMillis), 0)
  const isFull = pool.checkedOut >= limit
  const use = `${isFull ? `All ${limit}` : `${pool.checkedOut} of ${limit}`} connections are in use`
  const wait = waitersCount === 0 ? 'nobody waits' : `${number(waitersCount)} wait, the longest for ${duration(oldest)}`
  const refusals =
    refused > 0 ? ` ${number(refused)} ${refused === 1 ? 'was' : 'were'} refused in the last ten seconds.` : ''
  if (failed > 0) {
    const attempts =
      failed === 1 ? 'An attempt to open a connection has' : `${failed} attempts to open a connection have`
    return {
      level: 'broken',
      word: 'Cannot connect',
      sentence: `${attempts} just failed: the log says why. ${use}, ${wait}.`,
    }
  }
  if (refusedNow > 0 || (oldest >= 1000 && isFull) || (refused > 0 && isFull)) {
    return { level: 'exhausted', word: 'Exhausted', sentence: `${use}, ${wait}.${refusals} ${guilty(update)}` }
  }
  if (isFull) {
    const word = waitersCount > 0 ? 'Full, with a queue' : 'Full'
    return { level: 'full', word, sentence: `${use}, ${wait}. ${guilty(update)}` }
  }
  if (refused > 0) {
    return { level: 'full', word: 'Just recovered', sentence: `${use}, ${wait}.${refusals}` }
  }
  if (waitersCount > 0) {
    return { level: 'calm', word: 'Opening connections', sentence: `${use}, ${wait}.` }
  }
  return { level: 'calm', word: 'Room to spare', sentence: `${use}, ${wait}.` }
}

/** Changes a text only where it is another one, which spares the browser a layout. */
export function set(element, text) {
  if (element.textContent !== text) element.textContent = text
}
