import { execFile } from 'node:child_process'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

const root = fileURLToPath(new URL('../..', import.meta.url))
const typescript = dirname(createRequire(import.meta.url).resolve('typescript/package.json'))

/**
 * Everything that tsc says of a project; nothing when all is well. It is the native compiler itself that is run: the
 * script around it does not start under the test runner's loaders, which every Node process that a test starts gets.
 */
export async function compile(project: string, ...flags: string[]): Promise<string> {
  const { default: exePath } = (await import(pathToFileURL(join(typescript, 'lib', 'getExePath.js')).href)) as {
    default: () => string
  }
  return new Promise((resolve) => {
    execFile(exePath(), ['-p', project, ...flags], { cwd: root }, (error, stdout, stderr) => {
      resolve(stdout + stderr || (error === null ? '' : error.message))
    })
  })
}
