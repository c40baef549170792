#!/usr/bin/env bash
# Expected: a client whose connect() is turned away gets an error, or waits.
#
# Versions: trio 0.35.0, uvloop 0.22.1; CPython 3.11.7; Linux 6.18; Debian 12's
# Ruby, 3.1.2, which is left out where there is none.
#
# Behaviour: on a Unix stream socket whose backlog is full a connect() that may
# not wait fails with EAGAIN, and nothing goes on behind it: it has to be tried
# again. asyncio, trio and Ruby take it for EINPROGRESS, wait until the socket
# is writable, which one without a connection is at once, find no error in
# SO_ERROR, and hand out a socket as connected. The first read raises EINVAL,
# which looks like a mistake in the arguments. uvloop, which has asyncio's
# interface, raises BlockingIOError from connect().
#
# Seen:
#   asyncio: connected; read: EINVAL
#   trio: connected; read: EINVAL
#   uvloop: connect: EAGAIN
#   ruby: connected; read: EINVAL
#
# Source: asyncio/selector_events.py, _sock_connect(), and trio/_socket.py,
# connect(), catch BlockingIOError, in which Python joins EAGAIN, EINPROGRESS
# and EALREADY. ruby, ext/socket/init.c, rsock_connect(), has EAGAIN beside
# EINPROGRESS. connect(2) tells the two apart, for Unix sockets alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check trio==0.35.0 uvloop==0.22.1

cat >look.rb <<'END'
require 'socket'
begin
  sock = UNIXSocket.new(ARGV[0])
rescue SystemCallError => error
  abort "connect: #{error.class.name.split('::').last}"
end
begin
  sock.readpartial(1)
rescue SystemCallError => error
  puts "connected; read: #{error.class.name.split('::').last}"
end
END
cat >look.py <<'END'
import asyncio
import errno
import shutil
import socket
import subprocess
import sys

import trio
import uvloop

PATH = 's'
LIKE_CONNECTED = 'connected; read: EINVAL'


def code(error):
    """Of the error or, where a library has its own, of what it came from."""
    while not isinstance(error, OSError):
        error = error.__cause__
    return errno.errorcode[error.errno]


async def attempt(connect, read):
    try:
        stream = await connect(PATH)
    except OSError as error:
        return 'connect: ' + code(error)
    try:
        return 'connected; read %r' % await read(stream)
    except Exception as error:
        return 'connected; read: ' + code(error)


def by_asyncio():
    return attempt(asyncio.open_unix_connection,
                   lambda streams: streams[0].read(1))


def by_trio():
    return attempt(trio.open_unix_socket, lambda s: s.receive_some(1))


listener = socket.socket(socket.AF_UNIX)
listener.bind(PATH)
listener.listen(0)
first = socket.socket(socket.AF_UNIX)
first.connect(PATH)

seen = {
    'asyncio': asyncio.run(by_asyncio()),
    'trio': trio.run(by_trio),
    'uvloop': uvloop.run(by_asyncio()),
}
if shutil.which('ruby'):
    seen['ruby'] = subprocess.run(
        ['ruby', 'look.rb', PATH], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT).stdout.strip()
for name, what in seen.items():
    print('%s: %s' % (name, what))
sys.exit(seen != dict.fromkeys(seen, LIKE_CONNECTED) | {
    'uvloop': 'connect: EAGAIN'})
END
venv/bin/python look.py
