import { setMaxListeners } from 'node:events'
import { get, type IncomingMessage } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import { serveParent } from './child.ts'
import { ITEMS, LARGE_BYTES } from './items.ts'

/*
 * Clients on bad connections: they ask for a large answer, take their time to read it, and ask for the next.
 */

export interface SlowReaders {
  readonly port: number
  readonly readers: number
  readonly bytesPerSecond: number
}

export interface SlowOutcome {
  /** Answers that were read to their end, and had the right length. */
  readonly read: number
  /** The first answer that was wrong. */
  readonly complaint: string | undefined
}

const FILLED_WITHIN_MILLIS = 500

let stopping = new AbortController()
let reading: Promise<void>[] = []
let read = 0
let complaint: string | undefined

/** Resolves when the buffers of the kernel are filled, and answers go on at the pace of those who read them. */
async function start({ port, readers, bytesPerSecond }: SlowReaders): Promise<void> {
  stopping = new AbortController()
  read = 0
  complaint = undefined
  const { signal } = stopping
  // Every reader listens.
  setMaxListeners(0, signal)
  await new Promise<void>((begun) => {
    reading = Array.from({ length: readers }, async (_, reader) => {
      for (let turn = 0; !signal.aborted; turn++) {
        const id = ((reader + turn * readers) % ITEMS) + 1
        await readSlowly(port, id, bytesPerSecond, begun).catch((error: Error) => {
          if (!signal.aborted) complaint ??= error.message
        })
      }
    })
  })
  await sleep(FILLED_WITHIN_MILLIS)
}

/** The answers that are being read are given up. */
async function stop(): Promise<SlowOutcome> {
  stopping.abort()
  await Promise.all(reading)
  return { read, complaint }
}

async function readSlowly(port: number, id: number, bytesPerSecond: number, begun: () => void): Promise<void> {
  const path = `/items/${id}/large`
  const { signal } = stopping
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    get({ port, host: '127.0.0.1', path, agent: false, signal }, resolve).on('error', reject)
  })
  begun()
  let bytes = 0
  for await (const chunk of response) {
    bytes += chunk.length
    await sleep((chunk.length / bytesPerSecond) * 1000, undefined, { signal })
  }
  if (response.statusCode !== 200 || bytes !== LARGE_BYTES)
    throw new Error(`GET ${path} answered ${response.statusCode} with ${bytes} bytes`)
  read++
}

const calls = { start, stop }
export type SlowReaderCalls = typeof calls
serveParent(calls)
