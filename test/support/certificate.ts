import { createHash, generateKeyPairSync, sign } from 'node:crypto'

/** A key, and a certificate for `localhost` that signs itself, made for one run: no secret to keep, no tool to install. */
export function makeCertificate(): { key: string; cert: string } {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const name = sequence(set(sequence(oid(0x55, 0x04, 0x03), der(0x0c, Buffer.from('localhost')))))
  const signedWith = sequence(oid(0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02)) // ecdsa-with-SHA256
  const spki = publicKey.export({ type: 'spki', format: 'der' })
  const serial = createHash('sha256').update(spki).digest().subarray(0, 8)
  serial[0] = 1 + (serial[0]! & 0x3f)
  const day = 24 * 3_600_000
  const body = sequence(
    der(0xa0, der(0x02, Buffer.from([2]))),
    der(0x02, serial),
    signedWith,
    name,
    sequence(time(Date.now() - day), time(Date.now() + 30 * day)),
    name,
    spki,
  )
  const signature = sign('sha256', body, privateKey)
  const certificate = sequence(body, signedWith, der(0x03, Buffer.concat([Buffer.from([0]), signature])))
  const lines = certificate
    .toString('base64')
    .match(/.{1,64}/g)!
    .join('\n')
  return {
    key: privateKey.export({ type: 'pkcs8', format: 'pem' }) as string,
    cert: `-----BEGIN CERTIFICATE-----\n${lines}\n-----END CERTIFICATE-----\n`,
  }
}

/** ASN.1: a tag, a length, a value. */
function der(tag: number, value: Buffer): Buffer {
  const { length } = value
  const head =
    length < 128 ? [tag, length] : length < 256 ? [tag, 0x81, length] : [tag, 0x82, length >> 8, length & 255]
  return Buffer.concat([Buffer.from(head), value])
}

const sequence = (...values: Buffer[]) => der(0x30, Buffer.concat(values))
const set = (...values: Buffer[]) => der(0x31, Buffer.concat(values))
const oid = (...bytes: number[]) => der(0x06, Buffer.from(bytes))
const time = (millis: number) =>
  der(0x17, Buffer.from(`${new Date(millis).toISOString().replace(/[-:T]/g, '').slice(2, 14)}Z`))
