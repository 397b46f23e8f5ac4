import { machine } from '../machine.ts'
import { CONTENDERS, type ContenderName } from './contenders.ts'
import { SURVIVES } from './judge.ts'
import { ANSWERED_WITHIN_MILLIS, WAIT_MILLIS } from './scenario.ts'
import { SCENARIOS } from './scenarios.ts'

/** What everyone came to, by scenario. */
export type Verdicts = ReadonlyMap<string, ReadonlyMap<ContenderName, string>>

export interface Report {
  readonly verdicts: Verdicts
  readonly contenders: readonly ContenderName[]
  readonly postgresVersion: string
  readonly date: Date
}

/** The table, in Markdown. */
export function tableOf({ verdicts, contenders }: Pick<Report, 'verdicts' | 'contenders'>): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`
  const heading = [
    line(['', ...contenders.map((name) => CONTENDERS[name].title)]),
    line(['', ...contenders].map(() => '---')),
  ]
  const rows = [...verdicts].map(([scenario, of]) =>
    line([scenario, ...contenders.map((name) => shown(of.get(name) ?? '-'))]),
  )
  const sums = contenders.map((name) => {
    const survived = [...verdicts.values()].filter((of) => of.get(name) === SURVIVES).length
    return `${survived} of ${verdicts.size}`
  })
  return [...heading, ...rows, line(['survived', ...sums])].join('\n')
}

const shown = (verdict: string) => (verdict === SURVIVES ? verdict : `**${verdict}**`)

export async function reportOf(report: Report): Promise<string> {
  const facts = await machine(report.postgresVersion)
  const versions = facts.filter(([name]) => ['Node', 'PostgreSQL', 'Packages'].includes(name))
  const parts = [
    '# What each survives',
    `Written by \`npm run survival\` on ${report.date.toISOString().slice(0, 10)}.`,
    tableOf(report),
    METHOD,
    '## What each was given',
    report.contenders.map((name) => `- ${CONTENDERS[name].title}: ${CONTENDERS[name].given}`).join('\n'),
    '## The scenarios',
    SCENARIOS.map(({ name, what }) => `- **${name}**: ${what}`).join('\n'),
    '## The versions',
    versions.map(([name, value]) => `- ${name}: ${value}`).join('\n'),
  ]
  return `${parts.join('\n\n')}\n`
}

const METHOD = `Each cell is a Fastify server in a process of its own, with the same handlers, and a real PostgreSQL. It is judged by four
things: the answers, the rows in the database, the backends that are not free a second later, and whether the process
answers an ordinary request afterwards. The rule is the same everywhere: what was answered below 400 is in the database,
what was not is not, and whoever else asks is served. A pool has one connection (where a scenario needs it, two), so that one
that is not given back is missed at once, and waits at most ${WAIT_MILLIS / 1000} s for it, everyone's. What is not answered within
${ANSWERED_WITHIN_MILLIS / 1000} s hangs.

Some of it is a matter of taste, and said so that nobody is wronged: a transaction that knows nothing of HTTP commits when its
callback returns, whatever is answered then and whoever is still there to hear it.

Four times the process dies of an error on a client in use to which nobody listens. One more line,
\`pool.on('connect', (client) => client.on('error', …))\`, was tried too: with it \`pg\` by hand survives all four, and Kysely
three; where ROLLBACK fails it hides the handler's own error. Kysely 0.29.9, tried in place of the version below, does not
answer 200 for a swallowed error; in everything else it was the same.

With \`commitOn: 'onResponse'\` the client has its answer before COMMIT: that it is not told of one that fails is the price of that
mode; and where COMMIT gets no answer, its connection is given up after 2 s, which is longer than anyone waits here.`
