import { InvalidOption } from './errors.ts'

/**
 * The options that are the caller's own, as a copy that inherits nothing: what somebody has put on Object.prototype is no
 * option. @throws INVALID_OPTION where they come from another prototype, which was meant, and would be ignored
 */
export function ownOptions<Options extends object>(input: Options, path = ''): Options {
  for (const name in input) {
    if (Object.hasOwn(input, name) || name in Object.prototype) continue
    throw new InvalidOption(`${path}${name}`, 'an option of the object itself', 'one that it inherits')
  }
  return Object.assign(Object.create(null), input)
}
