#!/usr/bin/env bash
# Expected: SIGHUP has each of cotyledon's workers run reload(), and there are
# as many of them afterwards as before.
#
# Versions: cotyledon 2.2.0; CPython 3.11.7 and 3.14.10; Linux.
#
# Behaviour: with multiprocessing's fork server (Python 3.14's default) all
# workers run reload() and live on, and as many new ones are started beside
# them: two workers were asked for, four run. The master has lost the old ones
# from its books: it takes each for ended, with exit code 255.
#
# Seen:
#   fork: reloaded 2, running 2 of 2
#   forkserver: reloaded 2, running 4 of 2
#   forkserver: exit codes as the master has them: 255 255
#
# Source: cotyledon/_service_manager.py, _reload(), sends SIGHUP to its whole
# process group. In it are multiprocessing's helpers, too: forkserver.py,
# main(), ignores SIGINT alone, so the fork server is killed by it. And
# popen_forkserver.py, poll(), reads the end of the fork server's pipe as the
# end of the child: is_alive() is False from then on for all its children. The
# fork server is a child of the master, so there is even a SIGCHLD to look by.
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


def say(*words):
    with open('events', 'a') as file:
        file.write(' '.join(map(str, words)) + '\n')


class Worker(cotyledon.Service):
    def __init__(self, worker_id):
        super().__init__(worker_id)
        say('up', os.getpid())

    def run(self):
        threading.Event().wait()

    def reload(self):
        say('reload', os.getpid())


def dead(service_id, worker_id, exit_code):
    say('dead', exit_code)


if __name__ == '__main__':
    manager = cotyledon.ServiceManager(
        mp_context=multiprocessing.get_context(sys.argv[1]))
    manager.register_hooks(on_dead_worker=dead)
    manager.add(Worker, workers=2)
    manager.run()
END
cat >look.py <<'END'
import os
import signal
import subprocess
import sys
import time


def events(kind, count=0, seconds=10):
    """What was said of a kind, once there is so much of it."""
    deadline = time.monotonic() + seconds
    while True:
        with open('events') as file:
            found = [line.split()[1] for line in file
                     if line.startswith(kind) and line.endswith('\n')]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def running(pid):
    try:
        with open('/proc/%s/stat' % pid) as stat:
            return stat.read().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def reload(how):
    with open('events', 'w'):
        pass
    master = subprocess.Popen(
        [sys.executable, 'service.py', how], start_new_session=True,
        stderr=subprocess.DEVNULL)      # of resource trackers that start anew
    try:
        events('up', 2)
        time.sleep(0.5)     # for the master to be done with starting them
        master.send_signal(signal.SIGHUP)
        reloaded = len(events('reload', 2))
        events('up', 4, seconds=4)
        count = sum(map(running, events('up')))
        print('%s: reloaded %d, running %d of 2' % (how, reloaded, count),
              flush=True)
        return reloaded, count, events('dead')
    finally:
        os.killpg(master.pid, signal.SIGKILL)
        master.wait()


ok = reload('fork') == (2, 2, [])
found = reload('forkserver')
print('forkserver: exit codes as the master has them:', *found[2])
ok &= found == (2, 4, ['255', '255'])
sys.exit(not ok)
END
venv/bin/python look.py
