import { readdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createDatabase } from './support/database.ts'
import { checkCommand, commandsOf, curl } from './support/docs/commands.ts'
import { GIVEN } from './support/docs/given.ts'
import { modulesOf, type PageModule } from './support/docs/module.ts'
import { brokenLinks, type Page, readPage } from './support/docs/page.ts'
import { compileModule, runModule, writeModule } from './support/docs/run-page.ts'
import { type Test, test } from './support/test.ts'

const root = fileURLToPath(new URL('..', import.meta.url))
const inDocs = (await readdir(join(root, 'docs'))).filter((name) => name.endsWith('.md')).map((name) => `docs/${name}`)
// `node --import=tsx test/docs.ts docs/kysely.md` for one page.
const asked = process.argv.slice(2).filter((argument) => argument.endsWith('.md'))
const pages = await Promise.all(
  ['README.md', ...inDocs.sort()]
    .filter((name) => asked.length === 0 || asked.includes(name))
    .map((name) => readPage(root, name)),
)
/** Is followed word for word instead, with packages of its own: test/support/docs/follow.ts, a section of .ci/run. */
const GUIDE = 'docs/guide.md'
/** Not code of the plugin's: what a terminal shows, or a file of another program. */
const OTHER_LANGUAGES = ['', 'text', 'ini', 'python', 'http', 'diff', 'yaml', 'prisma']

test('the index names every page', async (t) => {
  const index = await readFile(join(root, 'docs/README.md'), 'utf8')
  for (const name of inDocs) if (name !== 'docs/README.md') t.match(index, `](${name.replace('docs/', '')})`, name)
})

for (const page of pages) {
  test(`${page.name}: what its blocks hold is known, and its links lead somewhere`, async (t) => {
    const languages = ['ts', 'js', 'sh', 'json', 'sql', ...OTHER_LANGUAGES]
    for (const { language, line, lines, file } of page.blocks) {
      t.ok(languages.includes(language), `${page.name}:${line}: a block of ${language}`)
      if (language === 'js') t.ok(file, `${page.name}:${line}: JavaScript begins with the name of its file`)
      const json = () => JSON.parse(lines.slice(file === undefined ? 0 : 1).join('\n'))
      if (language === 'json') t.doesNotThrow(json, `${page.name}:${line}: JSON`)
    }
    const read = (file: string) => readFile(join(root, file), 'utf8').catch(() => isFolder(file))
    t.strictSame(await brokenLinks(page, read), [])
  })

  if (page.name === GUIDE) continue
  test(`${page.name}: its commands are known, and those of the package work`, async (t) => {
    for (const command of commandsOf(page))
      t.equal(await checkCommand(command), undefined, `${page.name}:${command.line}: ${command.text}`)
  })

  for (const module of modulesOf(page)) {
    test(`${page.name}: the code of module ${module.number} compiles, and runs`, (t) => works(t, page, module))
  }
}

const isFolder = (file: string) =>
  readdir(join(root, file)).then(
    () => '',
    () => undefined,
  )

async function works(t: Test, page: Page, module: PageModule): Promise<void> {
  const { sql, types, env = {}, compiledOnly } = GIVEN[page.name] ?? {}
  const database = await createDatabase(t, sql === undefined ? {} : { sql })
  for (const { lines, line } of module.sql)
    await database.query(lines.join('\n')).catch((error) => t.fail(`${page.name}:${line}: ${error}`))
  const folder = await writeModule(module, database.connectionString, types)
  const complaints = await compileModule(module, folder)
  t.equal(complaints, '')
  if (complaints !== '') return
  if (compiledOnly !== undefined) return t.comment(`${page.name} is not run: ${compiledOnly}`)

  const own = { DATABASE_URL: database.connectionString, PORT: '3000', ...placed(env, database.connectionString) }
  const visits = commandsOf(page).filter(({ text, module: of }) => of === module.number && text.startsWith('curl '))
  const visit = async (urls: string[]) => {
    const wrong: string[] = []
    for (const command of visits) {
      const answer = await curl(command, urls)
      if (answer !== undefined) wrong.push(`${page.name}:${command.line}: ${command.text}: ${answer}`)
    }
    return wrong
  }
  t.strictSame(await runModule(module, folder, own, visit), [])
}

function placed(env: Readonly<Record<string, string>>, database: string): Record<string, string> {
  return Object.fromEntries(Object.entries(env).map(([name, value]) => [name, value.replace('{database}', database)]))
}
