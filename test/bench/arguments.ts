import t from 'tap'
import { HELP, readArguments, WrongArguments } from '../../bench/arguments.ts'
import { CONTENDERS, type NetworkName, SCENARIOS, type ScenarioName, titleOf } from '../../bench/plan.ts'

function cellsOf(...args: string[]) {
  return readArguments(args)!.cells
}

t.test('without arguments everything is measured, and written down', async (t) => {
  const plan = readArguments([])!
  t.match(plan, { name: 'full', write: true })
  const on = (network: NetworkName) =>
    plan.cells.filter((cell) => cell.network === network).map((cell) => cell.scenario)
  t.same(on('1ms'), ['read', 'update', 'insert', 'five'])
  t.same(on('5ms'), ['read', 'update', 'insert', 'five'])
  t.same(on('loopback'), Object.keys(SCENARIOS))
})

t.test('everybody takes part where it makes sense', async (t) => {
  const [untouched] = cellsOf('--scenario', 'untouched')
  t.same(untouched!.contenders, ['ours', 'ours-on-response', 'fastify', 'fastify-again'])
  const [read] = cellsOf('--scenario', 'read', '--network', '5ms')
  t.notOk(read!.contenders.some((name) => name.startsWith('fastify-again') || name === 'ours-max-waiting'))
  const [overload] = cellsOf('--scenario', 'overload')
  t.ok(overload!.contenders.includes('ours-max-waiting'))
})

t.test('what is asked for is what is measured, and not written down unless that is asked for, too', async (t) => {
  const plan = readArguments(['--scenario', 'insert,read', '--network', '5ms', '--rounds', '4', '--seconds', '0.5'])!
  t.match(plan, { name: 'custom', write: false })
  t.same(
    plan.cells.map(({ scenario, network, rounds, seconds }) => ({ scenario, network, rounds, seconds })),
    ['insert', 'read'].map((scenario) => ({ scenario, network: '5ms', rounds: 4, seconds: 0.5 })),
  )
  t.equal(readArguments(['--scenario', 'read', '--write'])!.write, true)
})

t.test('a scenario can be had on a network that is not its own', async (t) => {
  t.same(
    cellsOf('--scenario', 'slow', '--network', '1ms').map(({ network }) => network),
    ['1ms'],
  )
})

t.test('the one that all are compared with takes part in any case, twice', async (t) => {
  t.same(cellsOf('--scenario', 'read', '--network', '5ms', '--contender', 'ours')[0]!.contenders, [
    'pg',
    'pg-again',
    'ours',
  ])
  t.same(cellsOf('--scenario', 'untouched', '--contender', 'ours')[0]!.contenders, ['ours', 'fastify', 'fastify-again'])
})

t.test('where none of the contenders takes part, nothing is measured', async (t) => {
  const scenarios = cellsOf('--contender', 'ours-max-waiting').map((cell): ScenarioName => cell.scenario)
  t.same(scenarios, ['overload'])
  t.throws(() => readArguments(['--scenario', 'read', '--contender', 'fastify']), /nobody takes part/)
})

t.test('--quick is one subset, always the same', async (t) => {
  const plan = readArguments(['--quick'])!
  t.match(plan, { name: 'quick', write: false })
  const turns = plan.cells.reduce((sum, { contenders, rounds }) => sum + (contenders.length + 1) * rounds, 0)
  t.ok(turns * (plan.cells[0]!.seconds + 0.4) < 60, 'which leaves time to start everything within 90 seconds')
  t.equal(titleOf(plan), 'quick: read, update; loopback, 5ms; pg, pg-again, ours; 3 rounds of 0.6 s')
  t.throws(() => readArguments(['--quick', '--rounds', '3']), /--quick is a subset of its own/)
})

t.test('unknown names are refused with the list of what there is', async (t) => {
  const refusal = (...args: string[]) => {
    try {
      readArguments(args)
    } catch (error) {
      if (error instanceof WrongArguments) return error.message
    }
    return t.fail(`${args.join(' ')} was not refused`)
  }
  t.equal(refusal('--network', '5ms,3ms'), '--network: there is no "3ms", only loopback, 1ms, 5ms')
  t.equal(
    refusal('--scenario', 'toString'),
    `--scenario: there is no "toString", only ${Object.keys(SCENARIOS).join(', ')}`,
  )
  t.equal(refusal('--contender', ''), `--contender: there is no "", only ${Object.keys(CONTENDERS).join(', ')}`)
  t.equal(refusal('--rounds', '1.5'), '--rounds: expected a whole number from 1 on, got "1.5"')
  t.equal(refusal('--seconds', ''), '--seconds: expected a number from 0.1 to 60, got ""')
  t.match(refusal('--what'), /--what/)
  t.match(refusal('read'), /read/)
})

t.test('--help names everything there is', async (t) => {
  t.equal(readArguments(['--help']), undefined)
  for (const name of [...Object.keys(SCENARIOS), ...Object.keys(CONTENDERS), '5ms', '--quick']) t.match(HELP, name)
})
