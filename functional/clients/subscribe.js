// SPDX-License-Identifier: Apache-2.0
// Print the stream of a Unix socket, by Node.
const net = require('net')
const readline = require('readline')

readline.createInterface({ input: net.connect(process.argv[2]) })
  .on('line', line => console.log(line))
