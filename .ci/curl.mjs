// Runs a printed curl command where there is no curl: -X, -H, -d or --json, and the address.
import { request } from 'node:http'

const options = { method: undefined, headers: {}, body: undefined, url: '' }
const args = process.argv.slice(2)
while (args.length > 0) {
  const arg = args.shift()
  if (arg === '-X' || arg === '--request') options.method = args.shift()
  else if (arg === '-H' || arg === '--header') {
    const [name, ...value] = args.shift().split(':')
    options.headers[name.trim()] = value.join(':').trim()
  } else if (arg === '-d' || arg === '--data') options.body = args.shift()
  else if (arg === '--json') {
    options.headers['content-type'] = 'application/json'
    options.body = args.shift()
  } else if (!arg.startsWith('-')) options.url = arg
}
const { headers, body, url } = options
const method = options.method ?? (body === undefined ? 'GET' : 'POST')
request(url.includes('://') ? url : `http://${url}`, { method, headers }, (response) => {
  response.pipe(process.stdout)
  if (response.statusCode >= 400) process.exitCode = 22
}).end(body)
