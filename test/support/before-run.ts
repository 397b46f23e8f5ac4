// tap runs this once before all test files, as a child of the process whose children they will be.
import { startForRun } from './server.ts'

if (!process.env.DATABASE_URL) await startForRun(process.ppid)
