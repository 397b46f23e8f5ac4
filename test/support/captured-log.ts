/** One line of pino's, parsed. */
export interface LogLine {
  readonly level: number
  readonly msg: string
  readonly reqId?: string
  readonly err?: { message: string; code?: string; stack: string }
  readonly [key: string]: unknown
}

export interface CapturedLog {
  /** For `Fastify({ logger })`. */
  readonly options: { level: string; stream: { write(line: string): void } }
  /** What was logged so far. */
  readonly lines: LogLine[]
  /** The lines at level warn and above that speak of the plugin, but for the reports of refusals. */
  problems(): LogLine[]
}

/** A log that is kept in memory, to look at what was reported. */
export function captureLog(level = 'info'): CapturedLog {
  const lines: LogLine[] = []
  const stream = { write: (line: string) => void lines.push(JSON.parse(line)) }
  const problems = () =>
    lines.filter((line) => line.level >= 40 && line.msg.startsWith('request-db') && !isReport(line))
  return { options: { level, stream }, lines, problems }
}

const isReport = ({ requestDb }: LogLine) => (requestDb as { event?: string } | undefined)?.event === 'report'
