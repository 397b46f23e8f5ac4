import { setTimeout as pause } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Mailer } from './mailer.ts'
import { postpone, takeJob } from './repositories/jobs.ts'

const POLL_MILLIS = 500
const LONGEST_JOB_MILLIS = 30_000

/**
 * Does the jobs of the queue, one after the other, beside the requests; any number of processes can do it at once. A mail
 * is sent at least once: twice where its job's COMMIT fails, never not at all.
 */
export async function worker(app: FastifyInstance, { mailer }: { mailer: Mailer }): Promise<void> {
  const stopping = new AbortController()
  const { signal } = stopping
  let running: Promise<void> | undefined

  app.addHook('onReady', async () => {
    running = work()
  })
  app.addHook('preClose', async () => {
    stopping.abort()
    await running
  })

  async function work(): Promise<void> {
    while (!signal.aborted) {
      const isDone = await doOne().catch((error: unknown) => {
        if (!signal.aborted) app.log.error({ err: error }, 'the worker could not do a job')
        return false
      })
      if (!isDone) await pause(POLL_MILLIS, undefined, { signal }).catch(() => {})
    }
  }

  /** False when there is nothing to do. */
  async function doOne(): Promise<boolean> {
    let taken: number | undefined
    const options = { name: 'worker', signal, deadlineMillis: LONGEST_JOB_MILLIS, retry: { attempts: 3 } }
    try {
      return await app.db.session(options, async (db) => {
        const job = await takeJob(db)
        taken = job?.id
        if (job) await mailer.send(job.mail)
        return job !== undefined
      })
    } catch (error) {
      // In a session of its own: that of the job is rolled back. A worker that is stopped has not failed.
      const id = taken
      if (id !== undefined && !signal.aborted) await app.db.session((db) => postpone(db, id))
      throw error
    }
  }
}
