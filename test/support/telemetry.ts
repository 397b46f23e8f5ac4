import { channel } from 'node:diagnostics_channel'
import { type Attributes, context, SpanKind, type Tracer, trace } from '@opentelemetry/api'
import { type Histogram, MeterProvider, MetricReader } from '@opentelemetry/sdk-metrics'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import type { FastifyInstance } from 'fastify'
import type { Test } from './test.ts'

/** A point of a metric. */
export type Point = [attributes: Attributes, value: number | Histogram]

const EVENTS = 'connect wait checkout checkin begin statement-start statement commit rollback report leak'.split(' ')

/** The channels of the plugin on which somebody in this process listens. */
export const subscribed = (): string[] => EVENTS.filter((name) => channel(`fastify-request-db:${name}`).hasSubscribers)

class Reader extends MetricReader {
  protected async onForceFlush() {}
  protected async onShutdown() {}
}

/** OpenTelemetry's own providers, and what reached them. Shut down at the end of `t`. */
export function telemetry(t: Test) {
  const exporter = new InMemorySpanExporter()
  const tracerProvider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] })
  const reader = new Reader()
  const meterProvider = new MeterProvider({ readers: [reader] })
  t.teardown(async () => {
    await tracerProvider.shutdown()
    await meterProvider.shutdown()
  })
  /** What is measured of a name, by the values of its points' attributes. */
  const points = async (name: string): Promise<Point[]> => {
    const { resourceMetrics } = await reader.collect()
    const metrics = resourceMetrics.scopeMetrics.flatMap(({ metrics }) => metrics)
    return metrics
      .filter(({ descriptor }) => descriptor.name === name)
      .flatMap(({ dataPoints }) =>
        dataPoints.map(({ attributes, value }): Point => [attributes, value as number | Histogram]),
      )
  }
  const names = async () => {
    const { resourceMetrics } = await reader.collect()
    return resourceMetrics.scopeMetrics
      .flatMap(({ metrics }) => metrics.map(({ descriptor }) => descriptor.name))
      .sort()
  }
  /** Those of ours, in the order in which they ended. */
  const spans = () => exporter.getFinishedSpans().filter(({ kind }) => kind === SpanKind.CLIENT)
  return {
    providers: { tracerProvider, meterProvider },
    tracer: tracerProvider.getTracer('test'),
    spans,
    points,
    names,
  }
}

/** A span around each request, as an instrumentation of Fastify makes it. */
export function traceRequests(app: FastifyInstance, tracer: Tracer): void {
  app.addHook('onRequest', (request, reply, done) => {
    const span = tracer.startSpan(request.url)
    reply.raw.once('close', () => span.end())
    context.with(trace.setSpan(context.active(), span), done)
  })
}
