/**
 * Runs a command with DATABASE_URL set to a PostgreSQL that is there as long as the command:
 * node --import=tsx test/support/with-postgres.ts npm test
 */
import { spawn } from 'node:child_process'
import { sharedServer } from './server.ts'

const [command = '', ...args] = process.argv.slice(2)
const child = spawn(command, args, { stdio: 'inherit', env: { ...process.env, DATABASE_URL: await sharedServer() } })
child.on('error', (error) => {
  console.error(error)
  process.exitCode = 1
})
child.on('exit', (code) => {
  process.exitCode = code ?? 1
})
