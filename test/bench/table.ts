import t from 'tap'
import { toMarkdown, toText } from '../../bench/table.ts'

const TABLE = {
  title: 'read, 5ms',
  columns: ['contender', 'requests/s'],
  rows: [
    { cells: ['pg', '512'], ours: false },
    { cells: ['this plugin', '1,650'], ours: true },
  ],
  notes: ['One line.', 'Another.'],
}

t.test('on the terminal names are to the left and numbers to the right', async (t) => {
  t.equal(
    toText(TABLE),
    [
      'read, 5ms',
      '',
      'contender    requests/s',
      '-----------  ----------',
      'pg                  512',
      'this plugin       1,650',
      '',
      'One line.',
      'Another.',
    ].join('\n'),
  )
})

t.test('ours is set off only where that can be seen', async (t) => {
  t.notMatch(toText(TABLE, false), '\x1b')
  t.match(toText(TABLE, true), '\x1b[1mthis plugin       1,650\x1b[22m')
})

t.test('as Markdown it is the same', async (t) => {
  t.equal(
    toMarkdown(TABLE),
    [
      '### read, 5ms',
      '',
      '| contender | requests/s |',
      '| --- | ---: |',
      '| pg | 512 |',
      '| **this plugin** | 1,650 |',
      '',
      'One line.  ',
      'Another.',
    ].join('\n'),
  )
})
