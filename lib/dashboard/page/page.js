import { History, Totals } from './history.js'
import { showHolders, showReports, showRoutes, showWaiters } from './tables.js'
import { Timeline } from './timeline.js'
import { duration, judge, number, rate } from './words.js'

// About a pixel of the time line.
const FRAME_MILLIS = 80
const CALM_MILLIS = 3000

const $ = (id) => document.getElementById(id)
const set = (id, text) => {
  const element = $(id)
  if (element.textContent !== text) element.textContent = text
}

const history = new History()
const totals = new Totals()
const timeline = new Timeline($('lanes'), $('readout'), history)
const isStill = matchMedia('(prefers-reduced-motion: reduce)')
let isPaused = false
let reports = []
let level = { level: 'unknown', until: 0 }
let source
let lastFrame = 0

function announce(text) {
  set('announcer', text)
}

function showLink(state, text) {
  $('link').dataset.link = state
  set('link-text', text)
}

/** Worse at once, better only after a while: the word does not flicker. */
function showLevel(update) {
  const recent = {
    refused: totals.within(10_000, 'timeouts', 'saturated'),
    refusedNow: totals.within(2000, 'timeouts', 'saturated'),
    failed: totals.within(5000, 'failedConnects'),
  }
  const found = judge(update, recent)
  const ranks = ['unknown', 'calm', 'full', 'broken', 'exhausted']
  const isWorse = ranks.indexOf(found.level) >= ranks.indexOf(level.level)
  if (!isWorse && performance.now() <= level.until) {
    set('sentence', `Until a moment ago. Now ${found.sentence}`)
    return
  }
  if (found.level !== level.level) announce(`${found.word}. ${found.sentence}`)
  level = { level: found.level, until: performance.now() + CALM_MILLIS }
  document.body.dataset.level = found.level
  document.title = `${found.level === 'calm' ? '' : `${found.word}: `}pool ${update.pool.name}`
  set('word', found.word)
  set('sentence', found.sentence)
}

/** The latest report, while it is news. */
function showVerdict({ time }) {
  const [latest] = reports
  const ago = Math.max(0, time - Date.parse(latest?.at))
  const isNews = latest?.cause !== undefined && ago < 60_000
  $('verdict').hidden = !isNews
  if (!isNews) return
  set('verdict-cause', latest.cause)
  set('verdict-text', `${ago < 1500 ? 'Just now' : `${Math.round(ago / 1000)} s ago`}: ${latest.sentence}`)
}

function showFigures({ pool, waiters, waitersCount, holders }) {
  const limit = pool.size + pool.maxOverflow
  const busy = holders.reduce((sum, group) => sum + group.busy, 0)
  const shares = [busy, pool.checkedOut - busy, limit - pool.checkedOut]
  for (const [index, share] of shares.entries()) $('meter').children[index].style.flexGrow = String(Math.max(0, share))
  const oldest = waiters.reduce((most, { oldestMillis }) => Math.max(most, oldestMillis), 0)
  const refused = totals.within(60_000, 'timeouts', 'saturated')
  const { timeouts, saturated, opened, invalidated, recycled } = pool.totals
  set('name', pool.name)
  set('in-use', number(pool.checkedOut))
  set('in-use-of', `of ${pool.size}${pool.maxOverflow > 0 ? ` + ${pool.maxOverflow} overflow` : ''}`)
  set(
    'in-use-note',
    `${busy} busy, ${pool.checkedOut - busy} idle in transaction, ${Math.max(0, limit - pool.checkedOut)} to spare`,
  )
  set('waiting', number(waitersCount))
  set('waiting-note', waitersCount === 0 ? '' : `the longest for ${duration(oldest)}`)
  set('refused', number(refused))
  set('refused-note', `in all: timed out ${number(timeouts)}, queue full ${number(saturated)}`)
  set('checkouts', rate(totals.perSecond(5000, 'checkouts')))
  const [commits, rollbacks] = ['commits', 'rollbacks'].map((name) => rate(totals.perSecond(5000, name)))
  set('checkouts-note', `commits ${commits}, rollbacks ${rollbacks}`)
  set('open', number(pool.open))
  set('open-note', `opened ${number(opened)}, recycled ${number(recycled)}, invalidated ${number(invalidated)}`)
  $('waiting-tile').classList.toggle('alert', waitersCount > 0)
  $('refused-tile').classList.toggle('alert', refused > 0)
}

function show(update) {
  showLink('live', 'live')
  if (isPaused) return
  totals.add(update.at, update.pool.totals)
  timeline.update(update, history.add(update))
  showLevel(update)
  showVerdict(update)
  showFigures(update)
  showHolders($('holders'), update.holders)
  showWaiters($('waiters'), update.waiters)
  showRoutes($('routes'), update.routes)
  if (isStill.matches) timeline.draw()
}

/** What the page says is over now, and it says so. */
function showLost() {
  showLink('lost', 'disconnected, retrying')
  announce('Disconnected, retrying')
  const last = `${$('word').textContent}. ${$('sentence').textContent}`
  const isKnown = level.level !== 'unknown'
  level = { level: 'unknown', until: 0 }
  document.body.dataset.level = 'unknown'
  document.title = 'Disconnected'
  set('word', 'Disconnected, retrying')
  set('sentence', isKnown ? `Until ${new Date().toLocaleTimeString()}: ${last}` : '')
}

function connect() {
  source?.close()
  source = new EventSource(new URL('events', import.meta.url))
  source.addEventListener('message', ({ data }) => show(JSON.parse(data)))
  source.addEventListener('reports', ({ data }) => {
    reports = JSON.parse(data)
    if (!isPaused) showReports($('report-list'), reports)
  })
  source.addEventListener('error', () => {
    if ($('link').dataset.link !== 'lost') showLost()
    // The browser tries again by itself, but not after a refusal.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000)
  })
}

function togglePause() {
  isPaused = !isPaused
  $('pause').setAttribute('aria-pressed', String(isPaused))
  set('pause', isPaused ? 'Resume' : 'Pause')
  document.body.classList.toggle('paused', isPaused)
  announce(isPaused ? 'Paused' : 'Resumed')
  if (!isPaused) showReports($('report-list'), reports)
}

function frame(at) {
  requestAnimationFrame(frame)
  // A page that is not seen is not asked for frames.
  if (isPaused || isStill.matches || at - lastFrame < FRAME_MILLIS) return
  if ($('link').dataset.link !== 'live') return
  lastFrame = at
  timeline.draw()
}

$('pause').addEventListener('click', togglePause)
addEventListener('resize', () => timeline.draw())
showReports($('report-list'), [])
connect()
requestAnimationFrame(frame)
