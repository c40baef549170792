#!/usr/bin/env bash
# Expected: tempfile.TemporaryDirectory() lasts as long as the process that
# made it, or the object. What gunicorn's master makes with --preload is there
# until the master ends.
#
# Versions: gunicorn 27.0.1; CPython 3.11.7; Linux.
#
# Behaviour: it is gone with the first worker that is recycled, while the
# master and all other workers run on, and hold an object whose directory they
# take to be there. What multiprocessing.util.Finalize is to remove stays.
#
# Seen:
#   before: TemporaryDirectory there, Finalize's there
#   once a worker was recycled: TemporaryDirectory gone, Finalize's there
#   the master runs: True
#
# Source: gunicorn/arbiter.py, spawn_worker(): a worker is forked, and leaves
# by sys.exit(), so it runs the exit handlers of its master. weakref.finalize,
# on which TemporaryDirectory relies, keeps its registry over a fork;
# multiprocessing/util.py, Finalize.__call__(), compares pids.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check gunicorn==27.0.1

cat >app.py <<'END'
import os
import shutil
import tempfile
from multiprocessing import util

first = tempfile.TemporaryDirectory(dir='.', prefix='temporary-')
second = tempfile.mkdtemp(dir='.', prefix='finalize-')
util.Finalize(None, shutil.rmtree, (second,), exitpriority=0)


def application(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [b'%d\n' % os.getpid()]
END
cat >look.py <<'END'
import glob
import socket
import subprocess
import sys
import time


def request():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect('http')
        sock.sendall(b'GET / HTTP/1.0\r\n\r\n')
        data = b''
        while more := sock.recv(65536):
            data += more
    return int(data.split()[-1])


def until(predicate, seconds=20):
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def answers():
    try:
        return request()
    except OSError:
        return False


def there():
    return tuple(bool(glob.glob(name + '-*'))
                 for name in ('temporary', 'finalize'))


def words(found):
    return "TemporaryDirectory %s, Finalize's %s" % tuple(
        'there' if each else 'gone' for each in found)


master = subprocess.Popen([
    sys.executable, '-m', 'gunicorn', '--preload', '--workers', '1',
    '--max-requests', '3', '--bind', 'unix:http', '--log-level', 'error',
    '--no-control-socket', 'app:application'])
try:
    assert until(answers)
    before = there()
    print('before: ' + words(before))
    first = request()
    request()
    assert until(lambda: answers() not in (first, False))   # a new worker
    until(lambda: not there()[0], 2)
    after = there()
    print('once a worker was recycled: ' + words(after))
    print('the master runs:', master.poll() is None)
    ok = (before, after, master.poll()) == (
        (True, True), (False, True), None)
finally:
    master.terminate()
    master.wait()
sys.exit(not ok)
END
venv/bin/python look.py
