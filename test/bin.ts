import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { type Test, test } from './support/test.ts'

const BIN = fileURLToPath(new URL('../lib/bin.ts', import.meta.url))

async function run(...args: string[]) {
  const child = spawn(process.execPath, ['--import=tsx', BIN, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
  const [out, errors, [code]] = await Promise.all([text(child.stdout), text(child.stderr), once(child, 'exit')])
  return { out, errors, code: code as number }
}

const GIVEN = ['plan', '--rate', '500', '--hold', '12ms']

async function isRefused(t: Test, args: string[], message: string) {
  const { out, errors, code } = await run(...args)
  t.equal(code, 2, args.join(' '))
  t.equal(out, '')
  t.equal(errors.split('\n')[0], `fastify-request-db: ${message}`)
}

test('it can be started as a program', async (t) => {
  t.match(readFileSync(BIN, 'utf8'), /^#!\/usr\/bin\/env node\n/)
})

test('the plan of the README is printed', async (t) => {
  const args = '--workers 2 --size 16 --overflow 4 --rate 500 --hold 12ms --max-connections 100'.split(' ')
  const { out, errors, code } = await run('plan', ...args)
  t.equal(errors, '')
  t.equal(code, 0)
  t.match(out, /^2 workers, each with a pool of size 16 and overflow 4; 500 requests a second in all\.\n/)
  t.match(out, /needed at most +40 {3}2 workers x \(16 \+ 4\)\n/)
  t.match(out, 'Nothing: it is fine as it is.')
})

test('what is left out is what the plugin and PostgreSQL have by default', async (t) => {
  const { out } = await run(...GIVEN)
  t.match(out, '1 worker, each with a pool of size 10 and overflow 0')
  t.match(out, 'max_connections 100 - 3 reserved - 0 used by others')
  t.match(out, 'no connection within 10 s')
})

test('a duration is given in milliseconds, with or without their name, or in seconds', async (t) => {
  const [plain, named, seconds] = await Promise.all(
    ['20', '20ms', '0.02s'].map((hold) => run('plan', '--rate=500', `--hold=${hold}`, '--timeout=0.5s', '--others=7')),
  )
  t.match(plain?.out, '500 a second x 20 ms ask for 10.0 at once')
  t.match(plain?.out, 'no connection within 500 ms')
  t.match(plain?.out, '- 7 used by others')
  t.equal(plain?.out, named?.out)
  t.equal(plain?.out, seconds?.out)
})

test('help is printed where it is asked for', async (t) => {
  for (const args of [['--help'], ['plan', '--help'], ['plan', '-h'], ['help']]) {
    const { out, code } = await run(...args)
    t.equal(code, 0)
    t.match(out, /--rate 500 .*\(has to be given\)/)
    t.match(out, /--timeout 10s .*\(default 10s\)/)
  }
})

test('what is missing, or not what an option takes, is refused with its name, what it got and what it takes', async (t) => {
  const duration = 'it takes a duration above 0 such as 12ms, 0.5s, or 12 for milliseconds'
  const rate = 'it takes a number above 0 and up to 1000000, such as 500 or 0.5'
  const size = 'it takes a whole number from 1 to 1000000'
  await Promise.all([
    isRefused(t, ['plan', '--hold', '12ms'], `--rate is missing: ${rate}`),
    isRefused(t, ['plan', '--rate', '500'], `--hold is missing: ${duration}`),
    isRefused(t, ['plan', '--rate', '-5', '--hold', '12'], `--rate got '-5': ${rate}`),
    isRefused(t, ['plan', '--rate', '500', '--hold', '3m'], `--hold got '3m': ${duration}`),
    isRefused(t, ['plan', '--rate', '500', '--hold', '0'], `--hold got '0': ${duration}`),
  ])
  await Promise.all([
    isRefused(t, [...GIVEN, '--size', '0'], `--size got '0': ${size}`),
    isRefused(t, [...GIVEN, '--size', '1.5'], `--size got '1.5': ${size}`),
    isRefused(t, [...GIVEN, '--size'], `--size got no value: ${size}`),
    isRefused(t, [...GIVEN, '--size', '--overflow', '4'], `--size got '--overflow': ${size}`),
  ])
})

test('what does not belong there is refused by name', async (t) => {
  const names = '--rate, --hold, --workers, --size, --overflow, --timeout, --max-connections, --reserved, --others'
  await Promise.all([
    isRefused(t, [...GIVEN, '--pool', '4'], `--pool: there is no such option, but ${names}`),
    isRefused(t, [...GIVEN, 'quickly'], "'quickly' belongs to no option"),
    isRefused(t, [], 'no command: there is one, plan'),
    isRefused(t, ['go'], "'go': there is one, plan"),
  ])
})
