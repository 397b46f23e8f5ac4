/** A place on the time line that the keyboard moves: a row, and how long ago. */

const STEP_MILLIS = 500

const MOVES = {
  ArrowUp: ({ row, ago }) => ({ row: row - 1, ago }),
  ArrowDown: ({ row, ago }) => ({ row: row + 1, ago }),
  ArrowLeft: ({ row, ago }) => ({ row, ago: ago + STEP_MILLIS }),
  ArrowRight: ({ row, ago }) => ({ row, ago: ago - STEP_MILLIS }),
  Home: ({ row }) => ({ row, ago: Number.POSITIVE_INFINITY }),
  End: ({ row }) => ({ row, ago: 0 }),
}

/** Where a key leads from `cursor`, or from nowhere; undefined where it leads nowhere. */
export function moved(cursor, { key, ctrlKey, altKey, metaKey }, { rows, millis }) {
  const move = MOVES[key]
  if (move === undefined || ctrlKey || altKey || metaKey || rows === 0) return undefined
  const { row, ago } = cursor === undefined ? { row: 0, ago: 1000 } : move(cursor)
  return {
    row: Math.min(rows - 1, Math.max(0, row)),
    ago: Math.min(millis - STEP_MILLIS, Math.max(STEP_MILLIS, ago)),
  }
}
