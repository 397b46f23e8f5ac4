import fc from 'fast-check'

type Plain =
  | 'read'
  | 'write'
  | 'add'
  | 'flush'
  | 'swallow'
  | 'fail'
  | 'forget'
  | 'commit'
  | 'rollback'
  | 'throw'
  | 'pause'

/** One step of a handler. */
export type Step =
  | { readonly do: Plain }
  | { readonly do: 'parallel'; readonly statements: number }
  | { readonly do: 'nest'; readonly steps: readonly Step[]; readonly isUndone: boolean }

/** How a handler ends if no step has ended it. */
export type End = 'value' | 'nothing' | 'refuse' | 'stream' | 'late use'

export interface Program {
  readonly steps: readonly Step[]
  readonly end: End
}

/** What goes wrong while programs run, and when: milliseconds after their start. */
export interface Fault {
  readonly kind:
    | 'none'
    | 'kill a backend'
    | 'cancel a statement'
    | 'cut a connection'
    | 'lose the answer to a COMMIT'
    | 'slow down'
    | 'go silent'
    | 'client leaves'
  readonly afterMillis: number
  /** Which of several: a backend, a connection or a client. */
  readonly which: number
}

export interface Scenario {
  readonly programs: readonly Program[]
  readonly faults: readonly Fault[]
}

const plain = (...names: Plain[]): fc.Arbitrary<Step> => fc.constantFrom(...names).map((name) => ({ do: name }))

const { step } = fc.letrec<{ step: Step }>((tie) => ({
  step: fc.oneof(
    { maxDepth: 3, withCrossShrink: true },
    { weight: 12, arbitrary: plain('read', 'write', 'write', 'add', 'add', 'flush', 'pause') },
    { weight: 2, arbitrary: plain('commit', 'rollback') },
    { weight: 2, arbitrary: plain('swallow', 'fail', 'throw', 'forget') },
    {
      weight: 2,
      arbitrary: fc.record({ do: fc.constant('parallel' as const), statements: fc.integer({ min: 2, max: 4 }) }),
    },
    {
      weight: 3,
      arbitrary: fc.record({
        do: fc.constant('nest' as const),
        steps: fc.array(tie('step'), { maxLength: 4 }),
        isUndone: fc.boolean(),
      }),
    },
  ),
}))

const program: fc.Arbitrary<Program> = fc.record({
  steps: fc.array(step, { maxLength: 7 }),
  end: fc.constantFrom<End>('value', 'value', 'value', 'nothing', 'refuse', 'stream', 'late use'),
})

const fault: fc.Arbitrary<Fault> = fc.record({
  kind: fc.oneof(
    ...(
      [
        ['none', 40],
        ['kill a backend', 20],
        ['cancel a statement', 40],
        ['cut a connection', 20],
        ['lose the answer to a COMMIT', 10],
        ['slow down', 10],
        // Only deadlines end it, so it takes its time.
        ['go silent', 1],
        ['client leaves', 40],
      ] as const
    ).map(([kind, weight]) => ({ weight, arbitrary: fc.constant<Fault['kind']>(kind) })),
  ),
  afterMillis: fc.integer({ min: 0, max: 12 }),
  which: fc.nat(7),
})

/** Programs that run at the same time on a pool that is too small for them, and what happens to them meanwhile. */
export const scenario: fc.Arbitrary<Scenario> = fc.record({
  programs: fc.array(program, { minLength: 1, maxLength: 5 }),
  faults: fc.array(fault, { maxLength: 3 }),
})
