/** Moments by name, such as `working`: each comes once, and can be waited for before and after. */
export class Moments {
  readonly #moments = new Map<string, { readonly come: () => void; readonly has: Promise<void> }>()

  come(name: string): void {
    this.#moment(name).come()
  }

  when(name: string): Promise<void> {
    return this.#moment(name).has
  }

  #moment(name: string): { readonly come: () => void; readonly has: Promise<void> } {
    const known = this.#moments.get(name)
    if (known) return known
    let come = () => {}
    const has = new Promise<void>((resolve) => {
      come = resolve
    })
    this.#moments.set(name, { come, has })
    return { come, has }
  }
}
