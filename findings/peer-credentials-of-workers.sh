#!/usr/bin/env bash
# Expected: SO_PEERCRED tells a client of a Unix socket whose it is: who bound
# it, or who answers. With a master that binds and listens, and workers that
# accept, either the master or the worker at the other end.
#
# Versions: gunicorn 27.0.1, uvicorn 0.54.0, Hypercorn 0.18.0; CPython 3.11.7;
# Linux 6.18.
#
# Behaviour: with asyncio in the workers it is whichever worker started last,
# also where the other one answers, and changes whenever a worker is replaced.
# Where the workers have another uid than the master the uid changes with it:
# what root, or a service manager, has made and listens at is a worker's to its
# clients as soon as one runs. The kernel takes the credentials of the last
# one who called listen(), and asyncio calls it on a socket that is passed to
# it, though it listens already; gunicorn takes care not to, in vain here.
#
# Seen:
#   gunicorn, sync: both workers answered; peer: the master
#   gunicorn, asgi: both workers answered; peer: one of the workers
#   uvicorn: both workers answered; peer: one of the workers
#   hypercorn: both workers answered; peer: one of the workers
#
# Source: asyncio/base_events.py, Server._start_serving(), which listens anew,
# and with the backlog of its own; so does uvloop, where it is installed, and
# trio does not. gunicorn/sock.py, BaseSocket._is_listening(). listen(2) and
# unix(7): "listen" is among the calls that set the credentials.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check \
    gunicorn==27.0.1 uvicorn==0.54.0 Hypercorn==0.18.0

cat >app.py <<'END'
import os


def wsgi(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [b'pid=%d.' % os.getpid()]


async def asgi(scope, receive, send):
    if scope['type'] == 'lifespan':
        for name in ('startup', 'shutdown'):
            await receive()
            await send({'type': 'lifespan.%s.complete' % name})
    else:
        await send({'type': 'http.response.start', 'status': 200,
                    'headers': []})
        await send({'type': 'http.response.body',
                    'body': b'pid=%d.' % os.getpid()})
END
cat >look.py <<'END'
import collections
import re
import socket
import struct
import subprocess
import sys
import time


def request():
    """The peer as the kernel has it, and who answered."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect('http')
        peer, _, _ = struct.unpack('3i', sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        sock.sendall(b'GET / HTTP/1.1\r\nHost: here\r\n'
                     b'Connection: close\r\n\r\n')
        data = b''
        while more := sock.recv(65536):
            data += more
    return peer, int(re.search(rb'pid=(\d+)\.', data)[1])


def requests(count):
    """Those peers, and those who answered, till two did so often each."""
    peers = set()
    answers = collections.Counter()
    deadline = time.monotonic() + 20
    while (len(answers) < 2 or min(answers.values()) < count
           ) and time.monotonic() < deadline:
        try:
            peer, worker = request()
        except OSError:     # nobody listens yet
            time.sleep(0.1)
        else:
            peers.add(peer)
            answers[worker] += 1
    return peers, set(answers)


def look(name, *command):
    server = subprocess.Popen([sys.executable, '-m', *command],
                              stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        requests(1)     # both run
        peers, workers = requests(5)
    finally:
        server.terminate()
        server.wait()
    who = ('the master' if peers == {server.pid} else
           'one of the workers' if len(peers) == 1 and peers < workers
           else 'more than one')
    print('%s: %s answered; peer: %s' % (
        name, 'both workers' if len(workers) == 2 else 'one worker', who),
        flush=True)
    return len(workers), who


gunicorn = ('gunicorn', '--no-control-socket', '--workers', '2', '--bind',
            'unix:http')
seen = (
    look('gunicorn, sync', *gunicorn, 'app:wsgi'),
    look('gunicorn, asgi', *gunicorn, '--worker-class', 'asgi', 'app:asgi'),
    look('uvicorn', 'uvicorn', '--workers', '2', '--uds', 'http', 'app:asgi'),
    look('hypercorn', 'hypercorn', '--workers', '2', '--bind', 'unix:http',
         'app:asgi'),
)
sys.exit(seen != ((2, 'the master'),) + ((2, 'one of the workers'),) * 3)
END
venv/bin/python look.py
