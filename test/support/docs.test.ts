import { createDatabase, type Database } from './database.ts'
import { checkCommand, commandsOf, curl } from './docs/commands.ts'
import { modulesOf } from './docs/module.ts'
import { brokenLinks, pageOf } from './docs/page.ts'
import { compileModule, runModule, writeModule } from './docs/run-page.ts'
import { t, test } from './test.ts'

// Of a page that is wrong, each of these has to say where: what is not noticed here is not noticed of any page.

const database: Database = await createDatabase(t)

const APP = `\`\`\`ts
import Fastify from 'fastify'
import requestDb from 'fastify-request-db'

const app = Fastify()
await app.register(requestDb, { connectionString: 'postgres://elsewhere:5432/none' })
await app.listen({ port: 3000 })
\`\`\`
`

async function complaints(name: string, text: string): Promise<string> {
  const page = pageOf(name, text)
  const wrong: string[] = []
  for (const module of modulesOf(page)) {
    const folder = await writeModule(module, database.connectionString)
    wrong.push(await compileModule(module, folder))
    const visits = commandsOf(page).filter(({ module: of, text }) => of === module.number && text.startsWith('curl '))
    const visit = async (urls: string[]) => {
      const answers = await Promise.all(visits.map((command) => curl(command, urls)))
      return answers.filter((answer) => answer !== undefined)
    }
    wrong.push(...(await runModule(module, folder, {}, visit)))
  }
  return wrong.join('\n')
}

test('blocks of a page are one module: imports are repeated, routes come after listen, curl finds the app', async (t) => {
  const text = `${APP}
\`\`\`ts
import Fastify, { type FastifyRequest } from 'fastify'
import { greet } from './words/greet.ts'

app.get('/greet', (request: FastifyRequest) => greet(request.url))
\`\`\`

\`\`\`ts
// words/greet.ts
export const greet = (url: string) => ({ hello: url })
\`\`\`

\`\`\`sh
curl http://127.0.0.1:3000/greet
\`\`\`

<!-- another module -->

${APP}`
  t.equal((await complaints('several.md', text)).trim(), '')
})

test('an error of types is told with the line of the page', async (t) => {
  const said = await complaints('types.md', `${APP}\n\`\`\`ts\nconst size: number = app.db.pool.name\n\`\`\`\n`)
  t.match(said, /^types\.md:11 \(page\.ts\): error TS2322/)
})

test('an error while it runs is told with the line of the page', async (t) => {
  const said = await complaints('throws.md', `${APP}\n\`\`\`ts\nthrow new Error('on purpose')\n\`\`\`\n`)
  t.match(said, /throws\.md: it ended with 1/)
  t.match(said, /throws\.md:11 \(page\.ts\)/)
})

test('a test that fails in a block is told', async (t) => {
  const failing = `\`\`\`ts
import test from 'node:test'
test('fails', () => { throw new Error('on purpose') })
\`\`\`
`
  t.match(await complaints('test.md', `${APP}\n${failing}`), 'test.md: it ended with 1')
  t.match(await complaints('tests.md', failing.replace('import', '// a.test.ts\nimport')), 'tests.md: it ended with 1')
})

test('a request that is not answered as the page says is told', async (t) => {
  const curls = 'curl http://127.0.0.1:3000/none # 404\ncurl -X POST localhost:3000/none\n'
  const said = await complaints('answers.md', `${APP}\n\`\`\`sh\n${curls}\`\`\`\n`)
  t.match(said.trim(), /^was answered 404: .*Route POST:\/none not found/)
})

test('a request that nothing listens to is told', async (t) => {
  const text = '```ts\nexport {}\n```\n\n```sh\ncurl http://127.0.0.1:3000/\n```\n'
  t.match(await complaints('curl.md', text), 'nothing of the page listens on port 3000')
})

test('a link to nothing, an unknown command and an open block are told', async (t) => {
  const page = pageOf('a/links.md', '# One two\n\n[x](#one-two) [y](b.md#c)\n[z](#three)\n\n```sh\nrm -rf /\n```\n')
  const read = async (file: string) => (file === 'a/b.md' ? '## C' : undefined)
  t.strictSame(await brokenLinks(page, read), ['a/links.md:4: #three leads nowhere'])
  const [command] = commandsOf(page)
  t.match(command, { line: 7, text: 'rm -rf /' })
  t.equal(await checkCommand(command!), 'is no command that pages use')
  t.throws(() => pageOf('open.md', 'x\n```ts\n'), { message: 'open.md:2: the block is not closed' })
})
