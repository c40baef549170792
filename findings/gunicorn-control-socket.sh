#!/usr/bin/env bash
# Expected: gunicornc asks the gunicorn that runs; after an upgrade on the fly
# (USR2, then QUIT to the old master) the new one. Of two services of one user
# the first keeps the control socket, or the second does.
#
# Versions: gunicorn 27.0.1 (control socket since 25.1.0, of 2026); CPython
# 3.11.7; Linux.
#
# Behaviour: the old master takes the new one's socket along when it goes, so
# that after each upgrade gunicornc finds nobody. Of two services gunicornc
# talks to the one that last forked a worker: a worker that is recycled or dies
# brings the socket to its master, and with it where "reload", "worker kill"
# and "shutdown" go. When either service ends the other has none. The next fork
# heals that; the log has no word of it.
#
# Seen:
#   one service: gunicornc finds it
#   upgraded, the old master is still there: gunicornc finds the new one
#   the old master has gone: gunicornc finds nobody
#   a worker of the new one was replaced: gunicornc finds the new one
#   two services: gunicornc finds the second
#   a worker of the first was replaced: gunicornc finds the first
#   the second has ended: gunicornc finds nobody
#
# Source: gunicorn/config.py, ControlSocket: one path per user by default.
# gunicorn/ctl/server.py: each fork stops the server and starts it anew
# (_stop_for_fork(), _restart_after_fork()), _serve() removes whatever it finds
# at the path before it binds, and stop() whatever is there at the end; neither
# looks whose it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check gunicorn==27.0.1

cat >app.py <<'END'
def application(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [b'yes']
END
cat >look.py <<'END'
import json
import os
import signal
import subprocess
import sys
import time

# The default path is then in this folder.
os.environ['XDG_RUNTIME_DIR'] = os.getcwd()


def until(predicate):
    deadline = time.monotonic() + 15
    while not (found := predicate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def log(name):
    try:
        with open(name + '.log') as file:
            return file.read()
    except FileNotFoundError:
        return ''


def start(name):
    master = subprocess.Popen([
        sys.executable, '-m', 'gunicorn', '--pid', name + '.pid', '--bind',
        'unix:' + name, '--log-file', name + '.log', 'app:application'],
        start_new_session=True)
    running.append(master)
    listens(name, 1)
    return master.pid


def listens(name, count):
    until(lambda: log(name).count('Control socket listening') >= count)
    time.sleep(0.3)


def replace_worker(name, master, count):
    """Have the master fork: a worker ends, and it starts another."""
    children = '/proc/%d/task/%d/children' % (master, master)
    with open(children) as file:
        workers = file.read().split()
    os.kill(int(workers[0]), signal.SIGTERM)
    listens(name, count)


def find(when, **pids):
    shown = subprocess.run(
        [sys.executable, '-m', 'gunicorn.ctl.cli', '--json', '--command',
         'show all'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    who = 'nobody'
    if not shown.returncode:
        pid = json.loads(shown.stdout)['arbiter']['pid']
        who, = [name for name in pids if pids[name] == pid]
    print('%s: gunicornc finds %s' % (when, who.replace('_', ' ')),
          flush=True)
    return who


def end(pid, number):
    """Of a master that is a child of this process, or was of one."""
    os.kill(pid, number)
    for each in running:
        if each.pid == pid:
            each.wait(15)
            return
    until(lambda: not os.path.exists('/proc/%d' % pid))


running = []
seen = []
try:
    old = start('one')
    seen.append(find('one service', it=old))
    os.kill(old, signal.SIGUSR2)
    listens('one', 3)       # the old one, which forked, and the new one
    with open('one.pid.2') as file:
        new = int(file.read())
    seen.append(find('upgraded, the old master is still there',
                     the_old_one=old, the_new_one=new))
    end(old, signal.SIGQUIT)
    time.sleep(2)           # for the new one to see that it is alone
    seen.append(find('the old master has gone', the_new_one=new))
    replace_worker('one', new, 4)
    seen.append(find('a worker of the new one was replaced', the_new_one=new))
    os.kill(new, signal.SIGTERM)
    until(lambda: not os.path.exists('one.pid'))

    first = start('first')
    second = start('second')
    both = {'the_first': first, 'the_second': second}
    seen.append(find('two services', **both))
    replace_worker('first', first, 2)
    seen.append(find('a worker of the first was replaced', **both))
    end(second, signal.SIGTERM)
    seen.append(find('the second has ended', **both))
finally:
    for each in running:    # and its workers, and the master it started
        try:
            os.killpg(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        each.wait()
sys.exit(seen != ['it', 'the_new_one', 'nobody', 'the_new_one', 'the_second',
                  'the_first', 'nobody'])
END
venv/bin/python look.py
