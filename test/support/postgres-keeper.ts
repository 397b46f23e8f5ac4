/**
 * The process that owns one PostgreSQL. It lives only as long as somebody wants it, so that a killed test run
 * leaves neither a server nor a folder behind: either the process that started it (the channel between them closes),
 * or, with an owner, the `tap` run of that pid, until the file that says so is deleted.
 */
import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createCluster } from './cluster.ts'
import { isAlive } from './is-alive.ts'
import type { KeeperAnswer, KeeperOrder, KeeperTask } from './server.ts'
import { createStandby } from './standby-cluster.ts'

const task = JSON.parse(process.argv[2] ?? '{}') as KeeperTask
const folder = await mkdtemp(join(tmpdir(), 'fastify-request-db-'))
const cluster = await (task.copyOf ? createStandby(folder, task.copyOf, task.flags) : createCluster(folder, task.flags))

const answer = (message: KeeperAnswer) => process.connected && process.send?.(message)

let ending = false
async function end(): Promise<void> {
  if (ending) return
  ending = true
  await cluster.remove()
  if (task.owner !== undefined) await rm(task.owner.file, { force: true })
  process.exit(0)
}

// Orders are carried out one after the other.
let work = cluster.start()
process.on('message', (order: KeeperOrder) => {
  work = work
    .then(() => cluster[order.call]())
    .then(
      () => void answer({ done: order.id }),
      (error: unknown) => void answer({ done: order.id, failed: String(error) }),
    )
})
process.on('disconnect', () => {
  if (task.owner === undefined) void end()
})

try {
  await work
  if (task.owner !== undefined) watch(task.owner.pid, task.owner.file)
  answer({ connectionString: cluster.connectionString })
} catch (error) {
  answer({ failed: String(error) })
  await end()
}

function watch(pid: number, file: string): void {
  let announced = false
  setInterval(() => {
    announced ||= existsSync(file)
    if (!isAlive(pid) || (announced && !existsSync(file))) void end()
  }, 100)
}
