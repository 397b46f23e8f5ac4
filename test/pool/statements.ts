import t from 'tap'
import { NamedStatements, UNNAMED } from '../../lib/pool/statements.ts'

/** Uses `text` so often that it has a name, and returns what it is run with. */
function named(names: NamedStatements, text: string) {
  const connection = names.open()
  for (let i = 0; i < 3; i++) connection.use(text, {})
  return { connection, prepared: connection.use(text, {}) }
}

t.test('a text is named when it comes for the fourth time, wherever it came before', async (t) => {
  const names = new NamedStatements(10)
  const connections = [names.open(), names.open()]
  for (const connection of [...connections, ...connections.slice(1)]) t.equal(connection.use('select 1', {}), undefined)
  t.match(connections[0]?.use('select 1', {}), { name: 'request_db_1', isReady: false })
  t.match(connections[1]?.use('select 1', {}), { name: 'request_db_1', isReady: false })
})

t.test('texts that are never the same are never named', async (t) => {
  const connection = new NamedStatements(10).open()
  for (let i = 0; i < 1000; i++) t.equal(connection.use(`select ${i}`, {}), undefined)
})

t.test('before its Parse is answered, only its own flight uses a name', async (t) => {
  const names = new NamedStatements(10)
  const { connection } = named(names, 'select 1')
  const flight = {}
  const other = names.open()
  const prepared = other.use('select 1', flight)
  t.ok(prepared)
  t.equal(other.use('select 1', flight), prepared)
  t.equal(other.use('select 1', {}), undefined)
  if (prepared) prepared.isReady = true
  t.equal(other.use('select 1', {}), prepared)
  t.strictSame(connection.takeClosing(), [])
})

t.test('a connection keeps cacheSize names and closes the least recently used', async (t) => {
  const names = new NamedStatements(2)
  const connection = names.open()
  const use = (text: string) => {
    for (let i = 0; i < 3; i++) connection.use(text, {})
    const prepared = connection.use(text, {})
    if (prepared) prepared.isReady = true
    return prepared?.name
  }
  const [a, b] = [use('a'), use('b')]
  use('a')
  t.strictSame(connection.takeClosing(), [])
  use('c')
  t.strictSame(connection.takeClosing(), [b])
  t.strictSame(connection.takeClosing(), [], 'once')
  use('d')
  t.strictSame(connection.takeClosing(), [a])
})

t.test('a text that is dropped gets a new name, and every connection closes the old one', async (t) => {
  const names = new NamedStatements(10)
  const { connection, prepared } = named(names, 'select 1')
  const other = names.open()
  const gone = names.open()
  other.use('select 1', {})
  gone.use('select 1', {})
  gone.end()
  connection.dropEverywhere('select 1')
  t.strictSame(connection.takeClosing(), [prepared?.name])
  t.strictSame(other.takeClosing(), [prepared?.name])
  t.strictSame(gone.takeClosing(), [])
  const again = other.use('select 1', {})
  t.ok(again)
  t.not(again?.name, prepared?.name)
})

t.test('what is forgotten is closed and parsed anew', async (t) => {
  const { connection, prepared } = named(new NamedStatements(10), 'select 1')
  if (prepared) connection.forget(prepared)
  t.strictSame(connection.takeClosing(), [prepared?.name])
  t.equal(connection.use('select 1', {})?.isReady, false)
  connection.forgetAll()
  t.strictSame(connection.takeClosing(), [prepared?.name])
})

t.test('switched off, nothing has a name', async (t) => {
  const connection = UNNAMED.open()
  for (let i = 0; i < 10; i++) t.equal(connection.use('select 1', {}), undefined)
  connection.forgetAll()
  connection.dropEverywhere('select 1')
  t.strictSame(connection.takeClosing(), [])
})
