# SPDX-License-Identifier: Apache-2.0
# Print the stream of a Unix socket, by Ruby.
require 'socket'

$stdout.sync = true
UNIXSocket.open(ARGV[0]) do |sock|
  sock.each_line { |line| puts line }
end
