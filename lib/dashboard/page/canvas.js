/** Gives the canvas as many pixels as the screen has for it. */
export function fit(canvas) {
  const ratio = Math.min(2, devicePixelRatio)
  const width = Math.round(canvas.clientWidth * ratio)
  const height = Math.round(canvas.clientHeight * ratio)
  if (width === 0 || height === 0) return { context: null }
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height })
  return { context: canvas.getContext('2d'), width, height }
}

/** The style sheet's colours, as a canvas takes them. */
export function readColours() {
  const style = getComputedStyle(document.documentElement)
  const colour = (name) => style.getPropertyValue(`--${name}`).trim()
  const names = ['track', 'busy', 'idle', 'grid', 'waiting', 'cursor']
  const colours = Object.fromEntries(names.map((name) => [name, colour(name)]))
  return { ...colours, hatch: hatchOf(colour('hatch')) }
}

/** Slanted lines: idle in transaction can be told from busy without colours. */
function hatchOf(colour) {
  const size = Math.round(8 * Math.min(2, devicePixelRatio))
  const tile = Object.assign(document.createElement('canvas'), { width: size, height: size })
  const context = tile.getContext('2d')
  context.strokeStyle = colour
  context.lineWidth = size / 5
  context.beginPath()
  for (const from of [-size, 0, size]) {
    context.moveTo(from - 2, size + 2)
    context.lineTo(from + size + 2, -2)
  }
  context.stroke()
  return context.createPattern(tile, 'repeat')
}
