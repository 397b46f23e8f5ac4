import {
  type Attributes,
  type Context,
  context,
  type Histogram,
  type Meter,
  type MeterProvider,
  metrics,
  type Observable,
  type Span,
  SpanKind,
  SpanStatusCode,
  type Tracer,
  type TracerProvider,
  trace,
} from '@opentelemetry/api'
import type { FastifyBaseLogger, FastifyInstance, FastifyPluginAsync } from 'fastify'
import fp from 'fastify-plugin'
import { sqlStateOf } from './errors.ts'
import { type CommitEvent, listen, type RollbackEvent, type StatementEvent } from './observe/channels.ts'
import { BUCKETS, DURATIONS, type Duration, listenToDurations, READINGS } from './observe/meter.ts'
import { checkObserverOptions, decoratorCheck, poolOf } from './observe/registration.ts'
import type { ObservedPool, Who } from './observe/snapshot.ts'
import { summarize } from './observe/summary.ts'

/** Options of `fastify.register(requestDbOpenTelemetry, options)`. */
export interface OpenTelemetryOptions {
  /** The `decorator` of the pool that is traced and measured. Default `'db'`. */
  decorator?: string | undefined
  /** Makes the spans. Default: the global one of `@opentelemetry/api`. */
  tracerProvider?: TracerProvider | undefined
  /** Makes the metrics. Default: the global one of `@opentelemetry/api`. */
  meterProvider?: MeterProvider | undefined
  /** Puts the SQL, without parameters but with what is written out in it, on the spans. Default true. */
  queryText?: boolean | undefined
  /** On all spans and on `db.client.operation.duration`, such as `{ 'db.namespace': 'shop', 'server.address': 'db1' }`. */
  attributes?: Attributes | undefined
}

const NAME = 'fastify-request-db'
const POOL = 'db.client.connection.pool.name'
const STATE = 'db.client.connection.state'
// The conventions' own.
const OPERATION_BUCKETS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10]

const hasMethod = (name: string) => (value: unknown) =>
  typeof (value as Record<string, unknown> | null)?.[name] === 'function'
const checks = {
  decorator: decoratorCheck,
  tracerProvider: { expected: 'a TracerProvider', test: hasMethod('getTracer') },
  meterProvider: { expected: 'a MeterProvider', test: hasMethod('getMeter') },
  queryText: { expected: 'true or false', test: (value: unknown) => typeof value === 'boolean' },
  attributes: { expected: 'an object', test: (value: unknown) => typeof value === 'object' && value !== null },
}

/** Spans and metrics after OpenTelemetry's conventions for database clients. @throws INVALID_OPTION */
async function observe(fastify: FastifyInstance, given: OpenTelemetryOptions): Promise<void> {
  const options = checkObserverOptions(given, checks)
  const { decorator = 'db', tracerProvider = trace, meterProvider = metrics } = options
  const pool = poolOf(fastify, decorator)
  const meter = meterProvider.getMeter(NAME)
  const stopMeter = measure(pool, meter)
  const operations = new Operations(tracerProvider.getTracer(NAME), meter, pool.name, options)
  const stopOperations = listen(pool, {
    'statement-start': guarded((event) => operations.start(event)),
    statement: guarded((event) => operations.end(event)),
    commit: guarded((event) => operations.settled('COMMIT', event)),
    rollback: guarded((event) => operations.settled('ROLLBACK', event)),
  })
  fastify.addHook('onClose', async () => {
    stopMeter()
    stopOperations()
  })
}

// What a listener throws ends the process. A sampler or processor of the app may throw.
function guarded<E extends { readonly log: FastifyBaseLogger }>(listener: (event: E) => void): (event: E) => void {
  return (event) => {
    try {
      listener(event)
    } catch (error) {
      event.log.error({ err: error }, 'request-db: a statement could not be traced')
    }
  }
}

/** The pool's own figures. Returns how to stop it. */
function measure(pool: ObservedPool, meter: Meter): () => void {
  const labels: Attributes = { [POOL]: pool.name }
  const readings = READINGS.map((reading): [(typeof READINGS)[number], Observable] => {
    const { name, unit, help: description, isTotal } = reading
    const metric = isTotal
      ? meter.createObservableCounter(name, { unit, description })
      : meter.createObservableUpDownCounter(name, { unit, description })
    return [reading, metric]
  })
  const observables = readings.map(([, metric]) => metric)
  const read: Parameters<Meter['addBatchObservableCallback']>[0] = (result) => {
    const snapshot = pool.snapshot()
    for (const [{ of }, metric] of readings) {
      for (const { value, state } of of(snapshot)) {
        result.observe(metric, value, state === undefined ? labels : { ...labels, [STATE]: state })
      }
    }
  }
  meter.addBatchObservableCallback(read, observables)

  const histogram = (duration: Duration) => {
    const { name, unit, help: description } = DURATIONS[duration]
    return meter.createHistogram(name, { unit, description, advice: { explicitBucketBoundaries: BUCKETS } })
  }
  const durations = {
    createTime: histogram('createTime'),
    waitTime: histogram('waitTime'),
    useTime: histogram('useTime'),
  }
  const stop = listenToDurations(pool, (duration, seconds) => durations[duration].record(seconds, labels))
  return () => {
    stop()
    meter.removeBatchObservableCallback(read, observables)
  }
}

interface Running {
  readonly span: Span
  readonly since: number
  readonly attributes: Attributes
}

/** A span for each statement, COMMIT and ROLLBACK, and how long they took. */
class Operations {
  readonly #tracer: Tracer
  readonly #duration: Histogram
  readonly #common: Attributes
  readonly #pool: Attributes
  readonly #isTextShown: boolean
  readonly #running = new WeakMap<StatementEvent, Running>()
  // COMMIT and ROLLBACK are told of in nobody's context, and belong to whatever the session's statements belonged to.
  readonly #contexts = new WeakMap<Who, Context>()

  constructor(tracer: Tracer, meter: Meter, pool: string, { queryText = true, attributes }: OpenTelemetryOptions) {
    this.#tracer = tracer
    this.#common = { 'db.system.name': 'postgresql', ...attributes }
    this.#pool = { [POOL]: pool }
    this.#isTextShown = queryText
    this.#duration = meter.createHistogram('db.client.operation.duration', {
      unit: 's',
      description: 'Time from asking for a statement to its outcome',
      advice: { explicitBucketBoundaries: OPERATION_BUCKETS },
    })
  }

  /** To be called where the app asks for the statement: the active span is the parent. */
  start(event: StatementEvent): void {
    const parent = context.active()
    this.#contexts.set(event.who, parent)
    const { operation, text } = summarize(event.text)
    const attributes = {
      ...this.#common,
      ...(text !== '' && { 'db.operation.name': operation, 'db.query.summary': text }),
    }
    const span = this.#open(text || 'postgresql', attributes, this.#isTextShown ? event.text : undefined, parent)
    this.#running.set(event, { span, since: performance.now(), attributes })
  }

  end(event: StatementEvent): void {
    const running = this.#running.get(event)
    if (running === undefined) return
    this.#running.delete(event)
    const { span, since, attributes } = running
    if (event.error === undefined && event.rows !== undefined) {
      span.setAttribute('db.response.returned_rows', event.rows.length)
    }
    this.#close(span, attributes, event.error, (performance.now() - since) / 1000)
  }

  settled(operation: 'COMMIT' | 'ROLLBACK', { who, millis, error }: CommitEvent | RollbackEvent): void {
    const parent = this.#contexts.get(who)
    if (parent === undefined) return
    const attributes = { ...this.#common, 'db.operation.name': operation, 'db.query.summary': operation }
    const endedAt = Date.now()
    const span = this.#open(operation, attributes, undefined, parent, endedAt - millis)
    this.#close(span, attributes, error, millis / 1000, endedAt)
  }

  #open(name: string, attributes: Attributes, text: string | undefined, parent: Context, startTime?: number): Span {
    const more = { ...attributes, ...this.#pool, ...(text !== undefined && { 'db.query.text': text }) }
    const options = { kind: SpanKind.CLIENT, attributes: more, ...(startTime !== undefined && { startTime }) }
    return this.#tracer.startSpan(name, options, parent)
  }

  #close(span: Span, attributes: Attributes, error: unknown, seconds: number, endedAt?: number): void {
    const failure = error === undefined ? {} : failureOf(error)
    if (error !== undefined) span.setAttributes(failure).setStatus({ code: SpanStatusCode.ERROR })
    span.end(endedAt)
    this.#duration.record(seconds, { ...attributes, ...failure })
  }
}

/** Which error, without its text: PostgreSQL quotes parameters there. */
function failureOf(error: unknown): Attributes {
  const state = sqlStateOf(error)
  if (state !== undefined) return { 'error.type': state, 'db.response.status_code': state }
  // An app's own function, such as `settings`, can throw anything.
  const { code, name } = (error ?? {}) as { code?: unknown; name?: unknown }
  return { 'error.type': [code, name].find((word): word is string => typeof word === 'string') ?? '_OTHER' }
}

/** The plugin: `await app.register(requestDbOpenTelemetry)`, after `requestDb`. Needs `@opentelemetry/api`. */
const plugin: FastifyPluginAsync<OpenTelemetryOptions> = fp(observe, {
  fastify: '^5.12.0',
  name: 'fastify-request-db-opentelemetry',
})

export { plugin as default, plugin as requestDbOpenTelemetry, plugin as 'module.exports' }
