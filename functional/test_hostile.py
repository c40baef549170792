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
take a whole core, or the log would grow by a line for each connection. Also
against readers that a service can have write to a terminal, forge lines in a
log, take memory without end, or not come back.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import base
import test_consumers

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


class HostileServiceTest(test_consumers.ConsumerTestCase):

    """The service lies to those who read; it is played by the test."""

    def connection(self, consumer, *arguments, **kwargs):
        """Serve the path, start a consumer, and return our end of it."""
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(base.PATIENCE)
            listener.bind(self.path)
            listener.listen(1)
            consumer(*arguments, **kwargs)
            sock = listener.accept()[0]
        os.unlink(self.path)
        self.addCleanup(sock.close)
        return sock

    def start_command(self, *arguments):
        self.process = subprocess.Popen(
            [*test_consumers.COMMAND, self.path, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(self.process.communicate)
        self.addCleanup(self.process.kill)

    def run_command(self, data, *arguments):
        """What the command line writes, and says, of what comes."""
        sock = self.connection(self.start_command, '--count', '10', *arguments)
        sock.sendall(data)
        return [each.splitlines() for each in self.process.communicate(
            timeout=base.PATIENCE)]

    def assert_harmless(self, line):
        self.assertTrue(line.decode('ascii').isprintable(), line)

    def test_command_writes_strict_lines_that_do_no_harm(self):
        values = (b'NaN', b'-Infinity', b'1e999', b'"\\ud800"', b'[\r1\t]',
                  b'"\x7f"', '"\x9b2J \u202e"'.encode(), b'"x"',
                  b'[' * 500 + b']' * 500, b'{"a":1,\r"a":2}')
        output, errors = self.run_command(b''.join(
            b'{"event_type": "x", "payload": %s}\r\n' % each
            for each in values))
        self.assertEqual(len(values), len(output))
        for line in output:
            self.assert_harmless(line)
            payload = json.loads(line, parse_constant=self.fail)['payload']
            json.dumps(payload, ensure_ascii=False).encode()
        self.assertEqual([b'connected'], [
            each.split(b': ')[-1] for each in errors])

    def test_command_writes_text_and_errors_that_do_no_harm(self):
        evil = 'a\nb\x1b[2J\x9b\u202e' + 'x' * 10000
        lines = [{'event_type': 'notifications.' + each, 'priority': evil,
                  'publisher_id': evil, 'payload': {
                      'lost': 10 ** 400, 'reason': evil, 'id': evil}}
                 for each in ('lost', 'refused')]
        lines += [evil] + 10 * [dict(lines[0], event_type=evil)]
        output, errors = self.run_command(''.join(
            json.dumps(each) + '\n' for each in lines).encode(), '--text')
        self.assertEqual((11, 4), (len(output), len(errors)), errors)
        for line in output + errors:
            self.assert_harmless(line)
            self.assertLess(len(line), 1500)
        self.assertIn(b': 0 notifications were lost', errors[1])

    def test_listener_takes_little_memory_whatever_comes(self):
        consumer = self.consumer()
        sock = self.connection(consumer.ask, 'listen', url=self.url)
        sock.sendall(b'{}\n')
        before = base.memory(consumer.pid)
        sock.sendall(b'{"payload":[' + b'{},' * (16 * base.MIB) + b'0]}\n')
        base.wait_until(lambda: consumer.ask('heard')['lost'] == 1,
                        'it is told lost')
        for _ in range(50000):
            sock.sendall(b'x')
        self.assertLess(base.memory(consumer.pid) - before, 8 * base.MIB)

    def test_descriptors_are_not_taken(self):
        # Where the kernel cannot refuse them, the connection ends.
        sock = self.connection(self.start_command)
        with open(os.devnull) as file:
            try:
                for _ in range(2):
                    socket.send_fds(sock, [b'x'], [file.fileno()])
                    sock.settimeout(base.PATIENCE)
                    self.assertEqual(b'', sock.recv(1))
            except (PermissionError, BrokenPipeError, ConnectionResetError):
                return
        self.fail('it was taken')
