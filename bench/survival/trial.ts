import { setTimeout as sleep } from 'node:timers/promises'
import { Call } from './call.ts'
import { CONTENDERS, type ContenderName } from './contenders.ts'
import { type Seen, verdictOf } from './judge.ts'
import { Network } from './network.ts'
import { ANSWERED_WITHIN_MILLIS, type Outcome, type Player, type Scenario, WAIT_MILLIS } from './scenario.ts'
import { Subject } from './subject.ts'
import { Witness } from './witness.ts'

const LEFT_FOR_MILLIS = 1000
const EXITS_WITHIN_MILLIS = 4000
const PLAYED_WITHIN_MILLIS = 15_000

let trials = 0

/** What one contender comes to in one scenario, in a few words. The database has `SCHEMA`. */
export async function trial(connectionString: string, name: ContenderName, scenario: Scenario): Promise<string> {
  // Without any word of the scenario: the network looks for some of them.
  const run = `survival ${process.pid} ${++trials}`
  const witness = new Witness(connectionString, run)
  const network = new Network(connectionString)
  await witness.open()
  let subject: Subject | undefined
  try {
    const url = new URL(await network.open())
    url.searchParams.set('application_name', run)
    const { file: contender, options = {} } = CONTENDERS[name]
    const { size = 1, name: played } = scenario
    const argument = { contender, options, scenario: played, size, timeoutMillis: WAIT_MILLIS }
    subject = await Subject.start({ ...argument, connectionString: url.href })
    return verdictOf(await seen(scenario, subject, witness, network))
  } finally {
    await subject?.stop()
    await network.close()
    await witness.close()
  }
}

async function seen(scenario: Scenario, subject: Subject, witness: Witness, network: Network): Promise<Seen> {
  const call: Player['call'] = (method, path) => new Call(subject.port, method, path, ANSWERED_WITHIN_MILLIS)
  const player: Player = {
    call,
    come: (moment) => subject.ask('come', moment),
    when: (moment) => subject.ask('when', moment),
    log: () => subject.ask('log'),
    later: () => subject.ask('later'),
    terminate: () => {
      subject.terminate()
      return Promise.race([subject.ended, sleep(EXITS_WITHIN_MILLIS, undefined)])
    },
    network,
    witness,
  }
  const { deeds, complaints = [] } = await played(scenario, player, subject)
  const left = (await witness.left(LEFT_FOR_MILLIS)).map(({ state }) => state)
  const notes = await witness.notes()
  if (scenario.ends) return { deeds, complaints, left, notes, alive: true, next: { status: 200, body: '' } }
  const next = await call('POST', '/ordinary').answer
  if (next === 'none') await Promise.race([subject.ended, sleep(LEFT_FOR_MILLIS)])
  return { deeds, complaints, left, notes, alive: subject.alive, next }
}

/** A process that dies takes the questions with it that it was asked. */
async function played(scenario: Scenario, player: Player, subject: Subject): Promise<Outcome> {
  const tooLate = sleep(PLAYED_WITHIN_MILLIS, undefined, { ref: false }).then(() => {
    throw new Error(`"${scenario.name}" was not over within ${PLAYED_WITHIN_MILLIS / 1000} s`)
  })
  try {
    return await Promise.race([scenario.play(player), tooLate])
  } catch (error) {
    if (subject.alive) throw error
    return { deeds: [] }
  }
}
