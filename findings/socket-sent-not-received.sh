#!/usr/bin/env bash
# Expected: a socket that multiprocessing sends to another process is under way
# once send() has returned, like any descriptor in a message of SCM_RIGHTS: the
# sender closes its own and may go; if the receiver dies the kernel closes what
# was under way, and the client sees the end of its connection.
#
# Versions: CPython 3.11.7, 3.14.10 and 3.15.2; billiard 4.3.2; Linux.
#
# Behaviour: the message holds but an address of the sender, where a thread
# waits to hand a duplicate to whoever asks for it. If nobody does, since the
# worker died with the message unread, or a queue was thrown away, the sender
# keeps the duplicate for good: that client never sees an end, and each such
# message costs a descriptor. If the sender ends first the message is worth
# nothing: recv() raises FileNotFoundError, as that thread's socket has gone.
# billiard, which celery's workers run on, does the same.
#
# Seen, and the like of billiard:
#   multiprocessing: received, and closed: client reads the end, descriptors +0
#   multiprocessing: receiver died: client reads nothing, descriptors +1
#   multiprocessing: five receivers died: client reads nothing, descriptors +5
#   multiprocessing: sender ended: recv(): FileNotFoundError
#
# Source: multiprocessing/reduction.py, DupFd(), where no process is being
# started, and multiprocessing/resource_sharer.py: DupFd duplicates,
# _ResourceSharer._serve() closes that once it was asked for, and nothing else
# does but a fork, in the child.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install -q --disable-pip-version-check billiard==4.3.2

cat >look.py <<'END'
import importlib
import os
import socket
import sys
import time


def worker(connection, how):
    """Receive what comes, or die while it is there to be received."""
    if how == 'received':
        connection.recv().close()
    elif how == 'died':
        connection.poll(None)
    os._exit(0)


def sender(connection, sock, seconds):
    connection.send(sock)
    time.sleep(seconds)


def descriptors():
    return len(os.listdir('/proc/self/fd'))


def dispatch(library, how):
    """Give a client to a worker. Return the client's end."""
    here, there = library.Pipe()
    process = library.Process(target=worker, args=(there, how))
    process.start()
    there.close()
    client, served = socket.socketpair()
    here.send(served)
    served.close()
    process.join()
    here.close()
    return client


def reads(client):
    client.settimeout(0.2)
    try:
        return 'nothing' if client.recv(1) else 'the end'
    except TimeoutError:
        return 'nothing'


def look(name):
    library = importlib.import_module(name)
    dispatch(library, 'received').close()       # the thread is there now
    found = []
    for what, how, count in (('received, and closed', 'received', 1),
                             ('receiver died', 'died', 1),
                             ('five receivers died', 'died', 5)):
        before = descriptors()
        clients = [dispatch(library, how) for _ in range(count)]
        read, = set(map(reads, clients))
        for each in clients:
            each.close()
        more = descriptors() - before
        print('%s: %s: client reads %s, descriptors %+d' % (
            name, what, read, more), flush=True)
        found.append((read, more))
    here, there = library.Pipe()
    client, served = socket.socketpair()
    process = library.Process(target=sender, args=(there, served, 0.2))
    process.start()
    process.join()
    try:
        here.recv()
        found.append('socket')
    except OSError as error:
        found.append(type(error).__name__)
    print('%s: sender ended: recv(): %s' % (name, found[-1]), flush=True)
    return found


if __name__ == '__main__':
    expected = [('the end', 0), ('nothing', 1), ('nothing', 5),
                'FileNotFoundError']
    sys.exit([look(name) for name in ('multiprocessing', 'billiard')]
             != [expected] * 2)
END
venv/bin/python -W ignore look.py     # of signal numbers, by billiard
