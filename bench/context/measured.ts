import Fastify from 'fastify'
import requestDb, { currentSession } from 'fastify-request-db'

/* One app in a process of its own: prints the CPU time of a request in microseconds, as JSON. */

const [connectionString = '', variant = 'off', requests = '2000'] = process.argv.slice(2)
const count = Number(requests)

const app = Fastify()
await app.register(requestDb, { connectionString, asyncContext: variant !== 'off', capacityCheck: false })

/** What a handler of some size awaits. */
async function layers(depth: number): Promise<void> {
  if (depth > 0) await layers(depth - 1)
}

app.get('/none', async () => {
  await layers(20)
  return 'ok'
})
app.get('/read', async (request) => {
  await layers(20)
  const db = variant === 'on' ? currentSession() : request.db
  return db.selectNoFrom((eb) => eb.val(1).as('n')).execute()
})

const figures: Record<string, number> = {}
for (const url of ['/none', '/read']) {
  await load(url, Math.ceil(count / 2))
  const { user, system } = process.cpuUsage()
  await load(url, count)
  const since = process.cpuUsage({ user, system })
  figures[url] = (since.user + since.system) / count
}
console.log(JSON.stringify(figures))
await app.close()

/** Eight at a time. */
async function load(url: string, times: number): Promise<void> {
  let left = times
  const client = async () => {
    while (left-- > 0) await app.inject(url)
  }
  await Promise.all(Array.from({ length: 8 }, client))
}
