#!/usr/bin/env bash
# Expected: cotyledon's master starts a new worker when one has died, whatever
# way multiprocessing starts them: mp_context is a documented argument, and to
# do so is what a master is for.
#
# Versions: cotyledon 2.2.0; CPython 3.11.7 and 3.14.10; Linux.
#
# Behaviour: with multiprocessing's fork server a worker that died is not
# replaced until the master gets a SIGCHLD for something else. As of Python
# 3.14 that is the default, though the docstring of ServiceManager has fork for
# it. With fork and spawn the next worker comes in less than a second.
#
# Seen:
#   fork: killed worker replaced: yes
#   spawn: killed worker replaced: yes
#   forkserver: killed worker replaced: no
#   forkserver: and once the master got a SIGCHLD: yes
#   default of this Python (fork): killed worker replaced: yes
# and with Python 3.14 the last line is
#   default of this Python (forkserver): killed worker replaced: no
#
# Source: cotyledon/_service_manager.py, _child_supervisor_thread(), waits for
# an event that only SIGCHLD sets. multiprocessing/forkserver.py, main(): the
# worker is a child of the fork server, so that is who gets the signal; the
# master would have to wait for Process.sentinel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check cotyledon==2.2.0

cat >service.py <<'END'
import multiprocessing
import os
import sys
import threading

import cotyledon


class Worker(cotyledon.Service):
    def __init__(self, worker_id):
        super().__init__(worker_id)
        with open('workers', 'a') as file:
            file.write('%d\n' % os.getpid())

    def run(self):
        threading.Event().wait()


if __name__ == '__main__':
    how = sys.argv[1]
    manager = cotyledon.ServiceManager(
        mp_context=multiprocessing.get_context(how) if how else None)
    manager.add(Worker, workers=1)
    manager.run()
END
cat >look.py <<'END'
import multiprocessing
import os
import signal
import subprocess
import sys
import time


def workers(count, seconds):
    """The pids of all workers so far, once there are so many."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with open('workers') as file:
                pids = [int(line) for line in file if line.endswith('\n')]
        except FileNotFoundError:
            pids = []
        if len(pids) >= count or time.monotonic() > deadline:
            return pids
        time.sleep(0.02)


def replaced(how):
    with open('workers', 'w'):
        pass
    master = subprocess.Popen([sys.executable, 'service.py', how],
                              start_new_session=True)
    try:
        first, = workers(1, 20)
        os.kill(first, signal.SIGKILL)
        yield len(workers(2, 4)) == 2
        master.send_signal(signal.SIGCHLD)
        yield len(workers(2, 4)) == 2
    finally:
        os.killpg(master.pid, signal.SIGKILL)
        master.wait()


def tell(name, value):
    print('%s: %s' % (name, 'yes' if value else 'no'), flush=True)
    return value


ok = True
for how in ('fork', 'spawn'):
    found, _ = replaced(how)
    ok &= tell('%s: killed worker replaced' % how, found)
found, after = replaced('forkserver')
ok &= not tell('forkserver: killed worker replaced', found)
ok &= tell('forkserver: and once the master got a SIGCHLD', after)
default = multiprocessing.get_context().get_start_method()
found, _ = replaced('')
tell('default of this Python (%s): killed worker replaced' % default, found)
ok &= found == (default == 'fork')
sys.exit(not ok)
END
venv/bin/python look.py
