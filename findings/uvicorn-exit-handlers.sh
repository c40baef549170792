#!/usr/bin/env bash
# Expected: a server that handles SIGTERM, and says that it has shut down and
# finished, exits as a program does that has come to its end: handlers of
# atexit run, and the exit status is 0.
#
# Versions: uvicorn 0.54.0; CPython 3.11.7; Linux.
#
# Behaviour: the application's shutdown runs in good order, and then the
# process kills itself by the very signal. So no handler of atexit runs, what
# should be flushed or removed by one is not, and the status is -15. After
# SIGINT, or where --limit-max-requests ends it, handlers run.
#
# Seen:
#   SIGTERM: shutdown of the application ran, atexit did not, status -15
#   SIGINT: shutdown of the application ran, atexit ran, status 0
#   limit: shutdown of the application ran, atexit ran, status 0
#
# Source: uvicorn/server.py, capture_signals(): when all is done each signal
# that was caught is raised again, with the handler that was there before it.
# For SIGINT that is Python's, which raises KeyboardInterrupt; for SIGTERM it
# is the kernel's default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check uvicorn==0.54.0

cat >app.py <<'END'
import atexit


def say(word):
    with open('events', 'a') as file:
        file.write(word + '\n')


atexit.register(say, 'atexit')


async def application(scope, receive, send):
    if scope['type'] == 'lifespan':
        for name in ('startup', 'shutdown'):
            await receive()
            say(name)
            await send({'type': 'lifespan.%s.complete' % name})
    else:
        await send({'type': 'http.response.start', 'status': 200})
        await send({'type': 'http.response.body', 'body': b'yes'})
END
cat >look.py <<'END'
import os
import signal
import socket
import subprocess
import sys
import time


def events():
    with open('events') as file:
        return file.read().split()


def request():
    with socket.socket(socket.AF_UNIX) as sock:
        while sock.connect_ex('http'):
            time.sleep(0.02)    # it is bound, and does not listen yet
        sock.sendall(b'GET / HTTP/1.0\r\n\r\n')
        while sock.recv(65536):
            pass


def end(name, *arguments):
    with open('events', 'w'):
        pass
    if os.path.exists('http'):
        os.unlink('http')
    server = subprocess.Popen([
        sys.executable, '-m', 'uvicorn', '--uds', 'http', '--log-level',
        'error', *arguments, 'app:application'])
    try:
        deadline = time.monotonic() + 20
        while 'startup' not in events() or not os.path.exists('http'):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if name == 'limit':
            request()
        else:
            server.send_signal(getattr(signal, name))
        status = server.wait(20)
    finally:
        server.kill()
        server.wait()
    found = 'shutdown' in events(), 'atexit' in events(), status
    print('%s: shutdown of the application %s, atexit %s, status %d' % (
        name, 'ran' if found[0] else 'did not', 'ran' if found[1]
        else 'did not', status), flush=True)
    return found


seen = (end('SIGTERM'), end('SIGINT'), end('limit', '--limit-max-requests',
                                           '1'))
sys.exit(seen != ((True, False, -15), (True, True, 0), (True, True, 0)))
END
venv/bin/python look.py
