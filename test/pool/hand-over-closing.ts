import { setImmediate as turn } from 'node:timers/promises'
import type { RequestDbOptions } from '../../lib/index.ts'
import { createDatabase } from '../support/database.ts'
import { eventually } from '../support/eventually.ts'
import { gate } from '../support/gate.ts'
import { HttpClient, listen } from '../support/http-client.ts'
import { inBothModes } from '../support/modes.ts'
import { notesIn, verbs } from '../support/notebook.ts'
import { buildRelay, freeze, handedOver, notesOf, RELAY, type Relay, STYLES } from '../support/relay.ts'
import { type Test, t } from '../support/test.ts'

// The app closes while sessions follow each other. Over HTTP Fastify waits for the answers before it ends the pool;
// injected requests it does not wait for, so that the pool's own patience counts.

const database = await createDatabase(t, { sql: RELAY })

const CLOSED = 'FST_REQUEST_DB_POOL_CLOSED'
const UNKNOWN = 'FST_REQUEST_DB_COMMIT_UNKNOWN'
const LOST = 'FST_REQUEST_DB_CONNECTION_LOST'
const VIAS = ['http', 'injection'] as const

interface Answer {
  readonly status: number
  readonly code: string | undefined
}

/** How requests come in. */
type Send = (path: string) => Promise<Answer>

async function sender(relay: Relay, via: (typeof VIAS)[number]): Promise<Send> {
  const outcome = (status: number, body: string): Answer => ({
    status,
    code: status === 200 ? undefined : (JSON.parse(body) as { code?: string }).code,
  })
  if (via === 'injection') {
    return async (path) => {
      const { statusCode, body } = await relay.post(path)
      return outcome(statusCode, body)
    }
  }
  const port = await listen(relay.app)
  return async (path) => {
    const client = new HttpClient(port).send('POST', encodeURI(path))
    // Who comes too late is not let in.
    const { status, body } = await client.response().catch(() => ({ status: 0, body: '{}' }))
    client.destroy()
    return outcome(status, body)
  }
}

/** Sends it; it waits in the queue when this resolves. */
async function enqueue({ app }: Relay, send: Send, path: string): Promise<{ answer: Promise<Answer> }> {
  const { waiting } = app.db.snapshot()
  const answer = send(path)
  await eventually(() => app.db.snapshot().waiting > waiting)
  return { answer }
}

/** The app, with how requests come in, and how to close it: the pool knows of it when `beginClosing` resolves. */
async function build(t: Test, via: (typeof VIAS)[number], options: RequestDbOptions) {
  const closing = gate()
  const relay = await buildRelay(t, database, options, (app) => {
    app.addHook(via === 'http' ? 'preClose' : 'onClose', async () => closing.open())
  })
  const send = await sender(relay, via)
  const beginClosing = async () => {
    const since = performance.now()
    const closed = relay.app.close().then(() => performance.now() - since)
    await closing.opened
    await turn()
    return { closed }
  }
  return { ...relay, relay, send, beginClosing }
}

/** What the log has to say of a request whose answer had left. */
function complaintAbout(path: string, { log }: Relay): string | undefined {
  const { reqId } = log.lines.find(({ req }) => (req as { url?: string } | undefined)?.url === encodeURI(path)) ?? {}
  return log.problems().find((line) => line.reqId === reqId)?.err?.code
}

async function isOver(t: Test, { app }: Relay): Promise<void> {
  t.match(app.db.snapshot(), { open: 0, checkedOut: 0, waiting: 0, holders: [], waiters: [] })
  await eventually(async () => (await database.backends()).length === 0)
}

for (const via of VIAS) {
  for (const style of STYLES) {
    const { name } = style

    inBothModes(
      database,
      `${via}: COMMIT and '${name}' behind it are finished, who waits is refused`,
      async (t, commitOn) => {
        const { relay, send, beginClosing } = await build(t, via, { commitOn })
        const ice = await freeze(t, database)
        const first = send('/one/slow A')
        await eventually(() => relay.app.db.snapshot().checkedOut === 1)
        const second = send(`/${name}/B`)
        await ice.frozen()
        await handedOver(relay)
        const third = await enqueue(relay, send, '/one/C')
        const { closed } = await beginClosing()
        t.match(await third.answer, { status: 503, code: CLOSED })
        await ice.thaw()
        t.equal((await first).status, 200)
        t.equal((await second).status, 200)
        await closed
        t.strictSame(await notesIn(database), ['slow A', ...notesOf(style, 'B')])
        t.match(relay.app.db.snapshot().totals, { handOvers: 1, commits: 2, opened: 1, closed: 1, invalidated: 0 })
        await isOver(t, relay)
      },
    )
  }

  inBothModes(
    database,
    `${via}: who is behind is evicted after closeGraceMillis, and COMMIT stands`,
    async (t, commitOn) => {
      const { relay, send, beginClosing } = await build(t, via, {
        commitOn,
        closeGraceMillis: 150,
        settleTimeoutMillis: 5000,
      })
      const ice = await freeze(t, database)
      const first = send('/one/slow A')
      await eventually(() => relay.app.db.snapshot().checkedOut === 1)
      const second = send('/one/B')
      await ice.frozen()
      await handedOver(relay)
      const { closed } = await beginClosing()
      await eventually(() => relay.app.db.snapshot().checkedOut === 1)
      await new Promise((resolve) => setTimeout(resolve, 250))
      await ice.thaw()
      t.equal((await first).status, 200)
      const { status, code } = await second
      if (commitOn === 'onSend') t.match({ status, code }, { status: 503, code: CLOSED })
      else t.ok(status === 503 || relay.log.problems().some(({ err }) => err?.code === CLOSED), 'it is not passed over')
      t.ok((await closed) < 2000)
      t.strictSame(await notesIn(database), ['slow A'])
      t.match(relay.app.db.snapshot().totals, { commits: 1, rollbacks: 1, cancels: 0, invalidated: 0 })
      await isOver(t, relay)
    },
  )

  inBothModes(
    database,
    `${via}: COMMIT in a hole keeps the app from closing for settleTimeoutMillis at most`,
    async (t, commitOn) => {
      const { relay, send, beginClosing } = await build(t, via, {
        commitOn,
        closeGraceMillis: 100,
        settleTimeoutMillis: 400,
      })
      const { app, proxy, log } = relay
      const trap = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'swallow')
      const first = send('/one/A')
      await trap.sprung
      const second = send('/one/B')
      await eventually(() => app.db.snapshot().totals.handOvers === 1)
      const { closed } = await beginClosing()
      if (commitOn === 'onSend') t.match(await first, { status: 500, code: UNKNOWN })
      else t.equal((await first).status, 200)
      const { status, code } = await second
      t.equal(status, 503)
      t.ok(code === CLOSED || code === LOST, String(code))
      t.ok((await closed) < 1500)
      if (commitOn === 'onResponse') t.ok(log.lines.some(({ err }) => err?.code === UNKNOWN))
      t.strictSame(await notesIn(database), [])
      t.match(app.db.snapshot().totals, { replays: 0, opened: 1, failedCommits: 1 })
      await isOver(t, relay)
    },
  )

  inBothModes(
    database,
    `${via}: nothing is handed over any more, and what is to be committed is served in its turn`,
    async (t, commitOn) => {
      const { relay, send, beginClosing } = await build(t, via, { commitOn })
      const { app, proxy } = relay
      const first = await relay.hold('A')
      // Its only write comes with its COMMIT; under onResponse it has been answered already.
      const second = await enqueue(relay, send, '/added/B')
      const held = proxy.trap({ from: 'server', type: 'C', text: 'COMMIT' }, 'hold')
      const { closed } = await beginClosing()
      first.letGo()
      await held.sprung
      t.match(app.db.snapshot(), { waiting: 1, totals: { handOvers: 0 } })
      held.release()
      t.equal((await first.answer).statusCode, 200)
      t.equal((await second.answer).status, 200)
      await closed
      t.strictSame(verbs(proxy), [['BEGIN', 'INSERT'], ['COMMIT'], ['BEGIN', 'INSERT', 'INSERT', 'COMMIT']])
      t.strictSame(await notesIn(database), ['A', 'B', 'B'])
      t.match(app.db.snapshot().totals, { handOvers: 0, commits: 2 })
      await isOver(t, relay)
    },
  )

  inBothModes(
    database,
    `${via}: a deferred write fails at COMMIT, and who is behind is sent again all the same`,
    async (t, commitOn) => {
      const { relay, send, beginClosing } = await build(t, via, { commitOn })
      const { app, proxy } = relay
      const held = proxy.trap({ from: 'server', type: 'E', text: '23502' }, 'hold')
      const first = send('/failing/A')
      await held.sprung
      const second = send('/one/B')
      await eventually(() => app.db.snapshot().totals.handOvers === 1)
      const { closed } = await beginClosing()
      held.release()
      t.match(await first, { status: 500, code: '23502' })
      t.equal((await second).status, 200)
      await closed
      t.strictSame(await notesIn(database), ['B'])
      t.match(app.db.snapshot().totals, { commits: 1, failedCommits: 1, opened: 1, closed: 1 })
      await isOver(t, relay)
    },
  )

  inBothModes(
    database,
    `${via}: the connection dies at COMMIT: who is behind is served or refused, never left`,
    async (t, commitOn) => {
      const { relay, send, beginClosing } = await build(t, via, { commitOn })
      const { app, proxy } = relay
      const held = proxy.trap({ from: 'client', type: 'P', text: 'COMMIT' }, 'hold')
      const first = send('/one/A')
      await held.sprung
      const second = send('/one/B')
      const third = send('/added/C')
      await eventually(() => app.db.snapshot().totals.handOvers === 1 && app.db.snapshot().waiting === 1)
      const { closed } = await beginClosing()
      proxy.cut('reset')
      if (commitOn === 'onSend') t.match(await first, { status: 500, code: UNKNOWN })
      else t.equal((await first).status, 200)
      const { status, code } = await second
      t.ok(via === 'http' ? status === 200 : code === CLOSED, String(code))
      t.equal((await third).status, 200, 'it was to be committed before the app began to close')
      t.ok((await closed) < 2000)
      t.strictSame(await notesIn(database), [...(status === 200 ? ['B'] : []), 'C', 'C'])
      await isOver(t, relay)
    },
  )

  inBothModes(database, `${via}: under load what is acknowledged is kept, and nothing else`, async (t, commitOn) => {
    for (let round = 0; round < 5; round++) {
      await database.query('delete from notes')
      const { relay, send } = await build(t, via, { commitOn, pool: { size: 2 } })
      const { app, proxy } = relay
      await app.db.ping()
      proxy.delay(1)
      const loads = STYLES.flatMap((style) => [1, 2, 3].map((n) => ({ style, note: `${style.name} ${n}` })))
      const answers = loads.map(({ style, note }) => send(`/${style.name}/${note}`))
      await eventually(() => app.db.snapshot().totals.handOvers >= 3 * round)
      await app.close()
      const kept = new Map<string, number>()
      for (const note of await notesIn(database)) kept.set(note, (kept.get(note) ?? 0) + 1)
      for (const [index, { style, note }] of loads.entries()) {
        const { status, code } = await (answers[index] as Promise<Answer>)
        const complaint = complaintAbout(`/${style.name}/${note}`, relay)
        if (complaint !== undefined) t.equal(commitOn, 'onResponse', 'who can be told is told')
        const isKept = status === 200 && complaint === undefined
        t.equal(kept.get(note) ?? 0, isKept ? style.rows : 0, `${note}: ${status} ${code} ${complaint}`)
        // Fastify's own 503 has no code.
        if (status > 200) t.ok(status === 503 && (code ?? CLOSED) === CLOSED, `${note}: ${status} ${code}`)
      }
      await isOver(t, relay)
    }
  })
}
