#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.


"""Neighbours that mean harm, or that are broken.

Guards against a service that whoever may connect can stop, slow or drown in
log lines: a subscriber that does no harm would miss something, the loop would
take a whole core, or the log would grow by a line for each connection.
"""

import os
import signal
import socket
import subprocess
import sys
import time

import base

# Connects and leaves, until it is to end, and says how often.
FLOOD = """
import select, socket, sys
count = 0
while not select.select([0], [], [], 0)[0]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
    count += 1
print(count)
"""


class FloodTest(base.RelayTestCase):

    """Somebody connects in a loop."""

    SECONDS = 3

    def flood(self):
        """Start; returns the process. Closing its input ends it."""
        process = subprocess.Popen(
            [sys.executable, '-S', '-E', '-c', FLOOD, self.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def test_nobody_misses_anything_and_little_is_logged(self):
        leader, follower = self.start_workers(2)
        self.assertEqual(leader.pid, self.leader_pid())
        steady = self.subscribe()
        base.wait_until(lambda: self.parent.log('subscriber connected'),
                        'it is connected')
        begin, cpu = time.monotonic(), base.cpu_seconds(leader.pid)
        flood = self.flood()
        emitted = visitors = 0
        while time.monotonic() < begin + self.SECONDS:
            visitor = self.subscribe()
            for worker in leader, follower:
                worker.ask('emit', count=5)
            visitor.wait(10)
            visitor.close()
            visitors += 1
            emitted += 10
        cpu = base.cpu_seconds(leader.pid) - cpu
        seconds = time.monotonic() - begin
        count = int(flood.communicate(b'end')[0])
        self.assert_complete(steady, emitted)
        # It was nine tenths, of which most was for the log.
        self.assertLess(cpu, seconds / 2)
        for event, expected in (('connected', 1 + visitors + count),
                                ('parted', visitors + count)):
            base.wait_until(lambda: self.parent.visits(event) == expected,
                            '%d have %s' % (expected, event))
        self.assertIn('pid %d, uid ' % flood.pid,
                      ''.join(self.parent.log('most often')))
        self.assertLessEqual(len(self.parent.log('subscriber')),
                             time.monotonic() - begin + 2)

    def test_a_hundred_readers_come_at_once(self):
        # Some frameworks take EAGAIN for a connection.
        publisher = self.publisher(max_subscribers=101)
        publisher.wait_log('served')
        base.stop(publisher.pid)
        sockets = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for sock in sockets:
            self.addCleanup(sock.close)
            sock.setblocking(False)
            sock.connect(self.path)
        publisher.kill(signal.SIGCONT)
        publisher.ask('emit', count=1)
        for sock in sockets:
            sock.settimeout(base.PATIENCE)
            self.assertIn(b'"test.event"', sock.recv(base.MIB))


class DescriptorTest(base.RelayTestCase):

    """Somebody passes a descriptor, here a harmless one, which nobody takes.

    Whoever read or closed the socket would close that, too: in the loop,
    and for as long as it takes.
    """

    def setUp(self):
        super().setUp()
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.setsockopt(socket.SOL_SOCKET, 83, 0)
            except OSError:
                self.skipTest('needs SO_PASSRIGHTS, of Linux 6.16')

    def assert_not_taken(self, sock):
        with open(os.devnull) as file:
            self.assertRaises(PermissionError, socket.send_fds, sock, [b'x'],
                              [file.fileno()])

    def connect(self, path):
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.connect(path)
        return sock

    def test_leader_takes_none(self):
        leader, follower = self.start_workers(2)
        subscriber = self.subscribe()
        self.assert_complete(subscriber, 0)
        base.stop(leader.pid)
        waiting = [self.connect(self.path + suffix)
                   for suffix in ('', '.relay')]
        for sock in subscriber.sock, *waiting:
            self.assert_not_taken(sock)
        leader.kill(signal.SIGCONT)
        waiting[0].settimeout(base.PATIENCE)
        follower.ask('emit', count=1)       # which was passed two itself
        self.assert_complete(subscriber, 1)
        self.assertIn(b'"test.event"', waiting[0].recv(base.MIB))
        for sock in subscriber.sock, waiting[0]:
            self.assert_not_taken(sock)

    def test_consumer_takes_none(self):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(base.PATIENCE)
            listener.bind(self.path)
            listener.listen()
            self.client([sys.executable, '-W', 'ignore', '-m',
                         'unix_notifier', self.path])
            sock = listener.accept()[0]
            self.addCleanup(sock.close)
            self.assert_not_taken(sock)


class PlacesTest(base.FunctionalTestCase):

    """One user takes all places there are."""

    def test_another_user_gets_a_fair_share(self):
        if os.getuid() != 0:
            self.skipTest('needs root, to be two users')
        publisher = self.publisher(max_subscribers=4, mode='0666')
        os.chmod(os.path.dirname(self.path), 0o711)
        ours = [self.subscribe() for _ in range(4)]
        as_nobody = [*base.CAT[:-1], base.CAT[-1].replace(
            'sock =', 'os.setuid(%d)\nsock =' % base.NOBODY, 1), self.path]
        for number in range(3):
            theirs = self.client(as_nobody)
            publisher.wait_log('pid %d,' % theirs.pid)
            if number < 2:
                publisher.ask('emit', count=1)
                self.assert_complete(theirs, 1)
        self.assertEqual('sock_max_subscribers is 4', theirs.refused)
        self.assertEqual([False, False, True, True],
                         [each.ended.is_set() for each in ours])
        for each, emitted in zip(ours, (2, 2, 1, 0)):
            self.assert_complete(each, emitted)
            self.assertEqual(emitted < 2, 'fewer' in (each.refused or ''))
