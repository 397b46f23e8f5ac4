import { duration, number, set } from './words.js'

/** Tables and reports. Whatever comes from the server goes in as text. Rows are kept and rewritten, never piled up. */

const create = (name, className = '', text = '') =>
  Object.assign(document.createElement(name), { className, textContent: text })

/** `cellsOf` returns the texts of a row's cells, the first of which names it. */
export function fillTable(table, groups, cellsOf, decorate = () => {}) {
  const body = table.tBodies[0]
  table.parentElement.hidden = groups.length === 0
  table.parentElement.nextElementSibling.hidden = groups.length > 0
  while (body.rows.length > groups.length) body.deleteRow(-1)
  for (const [index, group] of groups.entries()) {
    const texts = cellsOf(group)
    const row = body.rows[index] ?? addRow(body, texts.length)
    for (const [column, text] of texts.entries()) set(row.cells[column].firstChild ?? row.cells[column], text)
    decorate(row, group)
  }
}

function addRow(body, columns) {
  const row = body.insertRow()
  const name = create('th')
  name.scope = 'row'
  name.append(create('span'), create('code'))
  row.append(name)
  for (let column = 1; column < columns; column++) row.insertCell()
  return row
}

export const showHolders = (table, holders) =>
  fillTable(
    table,
    holders,
    ({ name, count, busy, oldestMillis }) => [name, number(count), number(count - busy), duration(oldestMillis)],
    (row, { lastStatement }) => set(row.querySelector('code'), lastStatement ?? ''),
  )

export const showWaiters = (table, waiters) =>
  fillTable(table, waiters, ({ name, count, oldestMillis }) => [name, number(count), duration(oldestMillis)])

export function showRoutes(table, routes) {
  const longest = routes.reduce((most, { holdP95 }) => Math.max(most, holdP95), 1)
  const cellsOf = ({ name, count, holdP50, holdP95, busyP95 }) => [
    name,
    number(count),
    ...[holdP50, holdP95, busyP95].map((millis) => (count === 0 ? '–' : duration(millis))),
  ]
  fillTable(table, routes, cellsOf, (row, { holdP95, busyP95 }) => {
    const bar = row.querySelector('.bar') ?? addBar(row)
    const busy = Math.min(busyP95, holdP95)
    bar.children[0].style.width = `${(busy / longest) * 100}%`
    bar.children[1].style.width = `${((holdP95 - busy) / longest) * 100}%`
  })
}

function addBar(row) {
  const bar = create('div', 'bar')
  bar.setAttribute('aria-hidden', 'true')
  bar.append(create('i', 'busy'), create('i', 'idle'))
  const cell = row.insertCell()
  cell.className = 'bars'
  cell.append(bar)
  return bar
}

/** Those that are there already stay, open or closed as they are. */
export function showReports(list, reports) {
  list.nextElementSibling.hidden = reports.length > 0
  const known = new Map(Array.from(list.children, (item) => [item.dataset.id, item]))
  const items = reports.map((report) => {
    const item = known.get(String(report.id)) ?? newReport(report)
    known.delete(String(report.id))
    if (item.dataset.times !== String(report.times)) writeReport(item, report)
    return item
  })
  for (const gone of known.values()) gone.remove()
  for (const [index, item] of items.entries()) {
    if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null)
  }
}

function newReport({ id }) {
  const item = create('li')
  item.dataset.id = String(id)
  const details = create('details')
  const summary = create('summary')
  summary.append(create('time'), create('strong', 'cause'), create('span', 'times'), create('span', 'sentence'))
  details.append(summary, create('div', 'inside'))
  item.append(details)
  return item
}

function writeReport(item, report) {
  item.dataset.times = String(report.times)
  const [time, cause, times, sentence] = item.querySelector('summary').children
  time.dateTime = report.at
  set(time, new Date(report.at).toLocaleTimeString())
  set(cause, report.cause ?? 'closing')
  set(times, report.times > 1 ? `${number(report.times)} times` : '')
  set(sentence, report.sentence ?? '')
  const inside = item.querySelector('.inside')
  const facts = `${report.code ?? 'Still waiting'}: ${report.checkedOut} in use, ${report.waiting} waiting.`
  inside.replaceChildren(
    create('p', 'facts', facts),
    groupList('Held by', report.holders),
    groupList('Waiting', report.waiters),
  )
}

function groupList(title, groups) {
  const box = create('div')
  if (groups.length === 0) return box
  const list = create('ul')
  for (const group of groups) {
    const { name, count, oldestMillis, busyMillis, idleMillis, lastStatement } = group
    const times = idleMillis === undefined ? '' : `, busy ${duration(busyMillis)}, idle ${duration(idleMillis)}`
    const line = create('li', '', `${number(count)} × ${name}, the oldest for ${duration(oldestMillis)}${times}`)
    if (lastStatement) line.append(create('code', '', lastStatement))
    list.append(line)
  }
  box.append(create('h3', '', title), list)
  return box
}
