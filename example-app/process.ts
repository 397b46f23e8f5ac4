import { readFile } from 'node:fs/promises'

/** What Linux's /proc says of a process. */
export interface Status {
  readonly name: string
  readonly state: string
  readonly parent: number
}

/** Whether the process is there and more than a dead entry that nobody collects. */
export async function isRunning(pid: number): Promise<boolean> {
  if (!signalTo(pid, 0)) return false
  return (await statusOf(pid))?.state !== 'Z'
}

/** False when there is no such process. Signal 0 only asks. */
export function signalTo(pid: number, signal: NodeJS.Signals | 0): boolean {
  try {
    process.kill(pid, signal)
    return true
  } catch (error) {
    return error instanceof Error && 'code' in error && error.code === 'EPERM'
  }
}

/** From Linux's /proc, which is there where `ps` is not; undefined on other systems. */
export async function statusOf(pid: number): Promise<Status | undefined> {
  const text = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '')
  const [, name, state, parent] = text.match(/^\d+ \((.*)\) (\S) (\d+)/s) ?? []
  return name && state ? { name, state, parent: Number(parent) } : undefined
}
