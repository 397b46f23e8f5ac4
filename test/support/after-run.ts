import { stopForRun } from './server.ts'

await stopForRun(process.ppid)
