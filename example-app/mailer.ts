export interface Mail {
  to: string
  subject: string
}

export interface Mailer {
  send(mail: Mail): Promise<void>
}

/** Where a real one would talk to a mail server, this one tells `say`. */
export function makeMailer(say: (line: string) => void): Mailer {
  return { send: async ({ to, subject }) => say(`Mail to ${to}: ${subject}`) }
}
