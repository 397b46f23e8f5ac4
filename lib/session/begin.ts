import { InvalidOption } from '../errors.ts'
import type { EffectiveRouteOptions, IsolationLevel, SettingValue } from '../options.ts'
import { ownOptions } from '../own-options.ts'
import { Step } from '../pool/flight.ts'

/** How a transaction begins. */
export interface BeginOptions {
  readonly isolationLevel?: IsolationLevel | undefined
  readonly readOnly?: boolean
  readonly deferrable?: boolean
}

/** The BEGIN statement. The isolation level is one of four checked words, so that nothing here needs quoting. */
export function beginStatement({ isolationLevel, readOnly, deferrable }: BeginOptions): string {
  let text = 'BEGIN'
  if (isolationLevel !== undefined) text += ` ISOLATION LEVEL ${isolationLevel.toUpperCase()}`
  if (readOnly) text += ' READ ONLY'
  if (deferrable) text += ' DEFERRABLE'
  return text
}

/** Whether COMMIT of such a transaction cannot fail: reads only, and no serialization to be broken by others. */
export function isCommitCertain({ isolationLevel, readOnly, deferrable }: BeginOptions): boolean {
  return readOnly === true && (isolationLevel !== 'serializable' || deferrable === true)
}

/** What the app says `settings` are. @throws INVALID_OPTION where all of them would be passed over, such as a promise's */
export function ownSettings(settings: Record<string, SettingValue>): Record<string, SettingValue> {
  const kind = Object.prototype.toString.call(settings).slice(8, -1).toLowerCase()
  // Nobody's tenant may be everybody's to the policies.
  if (kind !== 'object') throw new InvalidOption('settings', 'an object of names and values', kind)
  return ownOptions(settings, 'settings.')
}

/** The statement that sets run-time parameters until the end of the transaction; undefined where there are none. */
export function settingsStep(settings: Record<string, SettingValue>): Step | undefined {
  const values: string[] = []
  for (const [name, value] of Object.entries(settings)) {
    // A tenant that is undefined must stop the request, not show it everybody's rows.
    if (!['string', 'number', 'boolean'].includes(typeof value)) {
      throw new InvalidOption(
        `settings['${name}']`,
        'a string, number or boolean',
        value === null ? 'null' : typeof value,
      )
    }
    values.push(name, String(value))
  }
  if (values.length === 0) return undefined
  const calls = values
    .filter((_, index) => index % 2 === 0)
    .map((_, index) => `set_config($${2 * index + 1}, $${2 * index + 2}, true)`)
  return new Step({ text: `SELECT ${calls.join(', ')}`, values, flush: true, prefix: true }, () => {})
}

/** Settings that come from options rather than from the app; undefined where there are none. */
export function routeSettings(
  route: EffectiveRouteOptions,
  isReadOnly: boolean,
): Record<string, SettingValue> | undefined {
  // Without BEGIN there is no BEGIN READ ONLY either.
  const isReadOnlySet = route.autocommit && isReadOnly
  if (route.statementTimeoutMillis === false && !isReadOnlySet) return undefined
  return {
    ...(route.statementTimeoutMillis !== false && { statement_timeout: route.statementTimeoutMillis }),
    ...(isReadOnlySet && { transaction_read_only: 'on' }),
  }
}
