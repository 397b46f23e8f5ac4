import { readFileSync } from 'node:fs'

/** Nothing but the page's own files, and no other site around it. */
const HEADERS = {
  'content-security-policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; " +
    "base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
  'cache-control': 'no-store',
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-resource-policy': 'same-origin',
}

const TYPES = { css: 'text/css', js: 'text/javascript', svg: 'image/svg+xml', html: 'text/html' }

/** A file of the page and what it is sent with. */
export interface PageFile {
  readonly name: string
  readonly text: string
  readonly headers: Record<string, string>
}

const read = (name: string, type: keyof typeof TYPES): PageFile => ({
  name: `${name}.${type}`,
  text: readFileSync(new URL(`page/${name}.${type}`, import.meta.url), 'utf8'),
  headers: { ...HEADERS, 'content-type': `${TYPES[type]}; charset=utf-8` },
})

export const html: PageFile = read('page', 'html')

export const files: readonly PageFile[] = [
  read('page', 'css'),
  read('words', 'css'),
  read('lanes', 'css'),
  read('page', 'js'),
  read('history', 'js'),
  read('timeline', 'js'),
  read('canvas', 'js'),
  read('cursor', 'js'),
  read('tables', 'js'),
  read('words', 'js'),
  read('icon', 'svg'),
]

/** The page for this URL: with or without a slash at its end, the other files are below it. */
export function htmlAt(url: string): string {
  const path = url.replace(/[?#].*$/s, '')
  const last = path.slice(path.lastIndexOf('/') + 1).replace(/[^\w.~%-]/g, (char) => `&#${char.codePointAt(0)};`)
  return html.text.replace('<base href="./">', () => `<base href="./${last === '' ? '' : `${last}/`}">`)
}
