import { statusOf } from './process.ts'

const LOOK_EVERY_MILLIS = 500

/**
 * Under `npm start` there are npm and its shell above us. A SIGTERM to npm ends both, a SIGKILL only npm, and nobody
 * tells us: `stop` is called when one of them is gone.
 */
export function stopWithNpm(stop: () => void): void {
  if (!process.env.npm_lifecycle_event) return
  const before = ancestors()
  const look = async () => {
    if ((await ancestors()) !== (await before)) stop()
  }
  setInterval(look, LOOK_EVERY_MILLIS).unref()
}

async function ancestors(): Promise<string> {
  const shell = process.ppid
  return `${shell} ${(await statusOf(shell))?.parent}`
}
