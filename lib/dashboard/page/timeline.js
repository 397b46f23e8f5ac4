import { fit, readColours } from './canvas.js'
import { moved } from './cursor.js'
import { duration, number, set } from './words.js'

/** Draws the last minute: a lane for each connection, and the queue above them. */

const SHOWN_MILLIS = 60_000
const MOST_LANES = 200
const HINT = 'Point at a lane, or go to it with the arrow keys, to see who held it when.'

export class Timeline {
  #list
  #readout
  #history
  #rows = []
  #queue
  #paint
  /** In the server's time: how far behind ours, and how far behind itself it is drawn, so that there is always a next cell. */
  #skew = Number.POSITIVE_INFINITY
  #delay = 700
  #lastAt = 0
  /** Where the keyboard is: a row, and how long ago. */
  #cursor

  constructor(list, readout, history) {
    this.#list = list
    this.#readout = readout
    this.#history = history
    this.#queue = this.#row('queue')
    this.#queue.label.textContent = 'Queue'
    this.#paint = readColours()
    this.#tell(HINT)
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
      this.#paint = readColours()
      this.draw()
    })
    list.addEventListener('pointermove', (event) => this.#point(event))
    list.addEventListener('pointerleave', () => this.#tell(HINT))
    list.tabIndex = 0
    list.addEventListener('keydown', (event) => this.#press(event))
    list.addEventListener('blur', () => this.#moveTo(undefined))
  }

  update(update, isNew) {
    const received = performance.now()
    if (isNew) this.#skew = Number.POSITIVE_INFINITY
    else this.#delay = Math.min(61_000, Math.max(350, (update.at - this.#lastAt) * 1.3 + update.cellMillis))
    this.#skew = Math.min(this.#skew + 1, received - update.at)
    this.#lastAt = update.at
    this.#resize(update)
    const { pool, lanes, waitersCount } = update
    const bySlot = new Map(lanes.map((lane) => [lane.slot, lane]))
    let unseen = update.unseen
    let closed = this.#rows.length - pool.open
    for (const [slot, row] of this.#rows.entries()) {
      const lane = bySlot.get(slot)
      const isFree = lane === undefined && unseen-- > 0
      if (isFree) this.#free(slot, update)
      const isClosed = lane === undefined && !isFree
      this.#name(row, slot, lane, isClosed ? (closed-- > pool.maxOverflow ? 'not open' : 'overflow') : 'open')
    }
    set(this.#queue.now, waitersCount === 0 ? 'nobody waits' : `${number(waitersCount)} waiting`)
    this.#queue.item.dataset.state = waitersCount === 0 ? 'free' : 'waiting'
  }

  draw() {
    const { cellMillis } = this.#history
    const right = (performance.now() - this.#skew - this.#delay) / cellMillis
    if (!Number.isFinite(right)) return
    const cells = SHOWN_MILLIS / cellMillis
    this.#drawQueue(this.#queue.canvas, right, cells)
    for (const [slot, { canvas }] of this.#rows.entries())
      this.#drawLane(canvas, this.#history.lanes[slot], right, cells)
    if (this.#cursor !== undefined) this.#drawCursor(this.#cursor)
  }

  #resize({ pool, lanes }) {
    const slots = lanes.reduce((most, { slot }) => Math.max(most, slot + 1), pool.size + pool.maxOverflow)
    const rows = Math.min(MOST_LANES, slots)
    while (this.#rows.length < rows) this.#rows.push(this.#row('lane'))
    while (this.#rows.length > rows) this.#rows.pop().item.remove()
    if (this.#cursor !== undefined && this.#cursor.row >= rows) this.#moveTo(undefined)
    this.#list.classList.toggle('dense', rows > 24)
  }

  #row(kind) {
    const item = document.createElement('li')
    item.className = kind
    const [label, text, now, canvas] = ['span', 'span', 'span', 'canvas'].map((name) => document.createElement(name))
    for (const [name, element] of Object.entries({ label, text, now })) element.className = name
    canvas.setAttribute('aria-hidden', 'true')
    item.append(label, text, now, canvas)
    this.#list.append(item)
    return { item, label, text, now, canvas }
  }

  /** A connection that nobody has used yet has no cells of its own. */
  #free(slot, { cell, queue }) {
    const ring = this.#history.ring(slot)
    for (let at = cell - Math.max(1, queue.length); at < cell; at++) ring.put(at, 0, 0, -1)
  }

  #name(row, slot, lane, place) {
    const isFree = place === 'open'
    row.item.dataset.state = lane?.state ?? (isFree ? 'free' : 'closed')
    set(row.label, lane ? `${lane.pid}` : place)
    const [text, now] = lane ? this.#describe(lane, slot) : ['', isFree ? 'free' : '']
    set(row.text, text)
    set(row.now, now)
    row.item.title = lane?.statement ?? ''
  }

  /** One holder for long, or many short ones: then a share, which does not flicker. */
  #describe(lane, slot) {
    if (lane.heldMillis >= 1000) return [lane.route, `${lane.state} ${duration(lane.stateMillis)}`]
    const ring = this.#history.lanes[slot]
    const last = Math.floor(this.#lastAt / this.#history.cellMillis) - 1
    let used = 0
    let known = 0
    let who = -1
    for (let cell = last; cell > last - 30; cell--) {
      if (!ring.isKnown(cell)) continue
      const at = ring.read(cell)
      used += at.busy + at.idle
      known++
      if (who === -1) who = at.who
    }
    if (used === 0) return ['', 'free']
    return [this.#history.nameOf(who), `${Math.max(1, Math.round(used / known))} % in use`]
  }

  #drawLane(canvas, ring, right, cells) {
    const { context, width, height } = fit(canvas)
    if (context === null) return
    context.clearRect(0, 0, width, height)
    const scale = width / cells
    const first = Math.floor(right - cells)
    const last = Math.floor(right)
    for (let cell = first; cell <= last; ) {
      const look = ring === undefined ? -1 : ring.look(cell)
      let end = cell + 1
      while (end <= last && (ring === undefined ? -1 : ring.look(end)) === look) end++
      const x = Math.round((cell - right + cells) * scale)
      const wide = Math.round((Math.min(end, right) - right + cells) * scale) - x
      this.#drawRun(context, look, x, wide, height)
      cell = end
    }
    this.#drawGrid(context, width, height)
  }

  #drawRun(context, look, x, wide, height) {
    if (look === -1) return
    const { track, busy, idle, hatch } = this.#paint
    context.fillStyle = track
    context.fillRect(x, 0, wide, height)
    const busyHeight = Math.round((Math.floor(look / 101) / 100) * height)
    const idleHeight = Math.round(((look % 101) / 100) * height)
    if (busyHeight > 0) {
      context.fillStyle = busy
      context.fillRect(x, height - busyHeight, wide, busyHeight)
    }
    if (idleHeight === 0) return
    for (const style of [idle, hatch]) {
      context.fillStyle = style
      context.fillRect(x, height - busyHeight - idleHeight, wide, idleHeight)
    }
  }

  #drawGrid(context, width, height) {
    context.fillStyle = this.#paint.grid
    for (const share of [0.25, 0.5, 0.75]) context.fillRect(Math.round(width * share), 0, 1, height)
  }

  #drawQueue(canvas, right, cells) {
    const { context, width, height } = fit(canvas)
    if (context === null) return
    const { queue } = this.#history
    context.clearRect(0, 0, width, height)
    const first = Math.floor(right - cells)
    let most = 4
    for (let cell = first; cell <= right; cell++) most = Math.max(most, queue.read(cell))
    const scale = width / cells
    context.fillStyle = this.#paint.waiting
    for (let cell = first; cell <= right; cell++) {
      const count = queue.read(cell)
      if (count === 0) continue
      const x = Math.round((cell - right + cells) * scale)
      const tall = Math.max(2, (count / most) * (height - 2))
      context.fillRect(x, height - tall, Math.round((Math.min(cell + 1, right) - right + cells) * scale) - x, tall)
    }
    this.#drawGrid(context, width, height)
    context.fillStyle = this.#paint.grid
    context.fillRect(0, height - 1, width, 1)
  }

  #drawCursor({ row, ago }) {
    const { context, width, height } = fit(this.#rows[row].canvas)
    if (context === null) return
    context.fillStyle = this.#paint.cursor
    context.fillRect(Math.round(width * (1 - ago / SHOWN_MILLIS)) - 1, 0, 3, height)
  }

  #point({ target, offsetX }) {
    const row = target instanceof HTMLCanvasElement ? this.#rows.findIndex(({ canvas }) => canvas === target) : -1
    const text = row === -1 ? undefined : this.#read(row, SHOWN_MILLIS * (1 - offsetX / target.clientWidth))
    this.#tell(text ?? HINT)
  }

  #press(event) {
    const cursor = moved(this.#cursor, event, { rows: this.#rows.length, millis: SHOWN_MILLIS })
    if (cursor === undefined) return
    event.preventDefault()
    this.#moveTo(cursor)
  }

  #moveTo(cursor) {
    this.#cursor = cursor
    this.#tell(cursor === undefined ? HINT : (this.#read(cursor.row, cursor.ago) ?? this.#unknown(cursor)))
    this.draw()
  }

  /** Who had this connection then; undefined where nothing is known of it. */
  #read(row, ago) {
    const { cellMillis, lanes } = this.#history
    const cell = Math.floor((performance.now() - this.#skew - this.#delay - ago) / cellMillis)
    if (!lanes[row]?.isKnown(cell)) return undefined
    const { busy, idle, who } = lanes[row].read(cell)
    const name = this.#history.nameOf(who)
    const use = busy + idle === 0 ? 'free' : `${busy} % busy, ${idle} % idle in transaction`
    return `${duration(ago)} ago, ${this.#rows[row].label.textContent}: ${name === '' ? '' : `${name}, `}${use}`
  }

  #unknown({ row, ago }) {
    return `${duration(ago)} ago, ${this.#rows[row].label.textContent}: nothing known`
  }

  #tell(text) {
    set(this.#readout, text)
  }
}
