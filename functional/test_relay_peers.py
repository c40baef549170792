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

"""Only processes that belong together share a path, and all that do can.

Guards against a process of another user that is taken for a publisher, root
that owns a service's path, peers that do not understand each other and let
the path or the CPU suffer for it, and processes that are left out because
they live for a moment only or bring a copy of the module: something foreign
would be told or relayed, a file of root would lie where it shuts the service
out, CPU time would be spent in a quarrel, or lines would be missing.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import base
import unix_notifier

# A user that is neither root nor the service.
STRANGER = base.NOBODY - 1
HELLO = b'unix-notifier relay 2\n'
WELCOME = 'unix-notifier relay 2 [1, 2, 3]\n'
LINE = json.dumps(dict(dict.fromkeys(base.Account.KEYS, ''),
                       payload={})).encode('ascii') + b'\n'
# The publisher, with the module from another directory.
OTHER = """
import sys
sys.path[:0] = %r
import publisher
publisher.main()
"""
# A leader as far as others can see, of the user in the second argument. It
# answers each follower with what comes from stdin, and two descriptors of what
# the third names, and tells what it got.
FAKE = """
import fcntl, os, socket, sys, time
path, uid = sys.argv[1], int(sys.argv[2])
answer = sys.stdin.buffer.read()
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
lock = os.open(path + '.lock', os.O_RDWR | os.O_CREAT, 0o666)
fcntl.flock(lock, fcntl.LOCK_EX)
listener = socket.socket(socket.AF_UNIX)
listener.bind(path + '.relay')
os.chmod(path + '.relay', 0o666)
listener.listen(100)
unused = socket.socket(socket.AF_UNIX)
passed = {'none': [], 'file': [lock] * 2, 'socket': [unused.fileno()] * 2}
while True:
    sock = listener.accept()[0]
    try:
        if answer:
            socket.send_fds(sock, [answer], passed[sys.argv[3]])
        print(repr(sock.recv(1000)), flush=True)
    except OSError as error:
        print(repr(error), flush=True)
    sock.close()
"""
# Connects as the user in the second argument, and tells what it gets.
CONNECT = """
import os, socket, sys
path, uid = sys.argv[1], int(sys.argv[2])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
try:
    sock.connect(path)
    print(repr(sock.recv(1000)))
except OSError as error:
    print(type(error).__name__)
"""
# Two copies of the module in one process. It emits as many as each line says,
# by turns.
TWO = """
import sys, uuid
sys.path.insert(0, sys.argv[2])
import logging
from oslo_config import cfg
import unix_notifier
import vendored
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
conf = cfg.ConfigOpts()
conf([])
for module in (unix_notifier, vendored):
    module.register_opts(conf)
conf.set_override('sock_path', sys.argv[1], 'oslo_messaging_notifications')
drivers = [module.UnixDriver(conf) for module in (unix_notifier, vendored)]
number = 0
for line in sys.stdin:
    for _ in range(int(line)):
        number += 1
        for source, driver in enumerate(drivers):
            driver.notify({}, {
                'message_id': str(uuid.uuid4()), 'publisher_id': 'two',
                'event_type': 'test', 'priority': 'INFO', 'timestamp': '',
                'payload': {'source': str(source), 'number': number,
                            'pad': ''}}, 'info', 0)
    print(line.strip(), flush=True)
"""


class PeersTestCase(base.RelayTestCase):

    def setUp(self):
        super().setUp()
        self.run = os.path.dirname(self.path)
        self.relay = self.path + '.relay'

    def start(self, code, *arguments, **kwargs):
        """Start a program given as text; it is ended with the test."""
        process = subprocess.Popen(
            [sys.executable, '-c', code, *arguments], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, **kwargs)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stdin.close)
        self.addCleanup(process.wait, base.PATIENCE)
        self.addCleanup(process.kill)
        return process

    def assert_heard(self, workers, subscriber=None):
        """Each worker emits, and a subscriber gets it."""
        with contextlib.ExitStack() as stack:
            if subscriber is None:
                subscriber = self.subscribe()
                stack.callback(subscriber.close)
            expected = set()
            for worker in workers:
                worker.ask('emit', count=1)
                expected.add(('%d/0' % worker.pid, worker.ask('emitted')))

            def missing():
                return expected - {
                    (message['payload'].get('source'),
                     message['payload'].get('number'))
                    for message in list(subscriber.messages)
                    if isinstance(message['payload'], dict)}

            base.wait_until(lambda: not missing(),
                            lambda: '%s at %s' % (missing(), subscriber))
            self.assertEqual(0, subscriber.lost)

    def module(self, name, *changes):
        """A directory with a changed copy of the module."""
        directory = os.path.join(self.directory, 'copy-of-' + name)
        os.mkdir(directory)
        with open(unix_notifier.__file__) as original:
            text = original.read()
        for old, new in changes:
            self.assertIn(old, text)
            text = text.replace(old, new)
        with open(os.path.join(directory, name + '.py'), 'w') as copy:
            copy.write(text)
        return directory


class RootTest(PeersTestCase):

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('only root can be several users')
        os.chown(self.run, base.NOBODY, base.NOBODY)

    def _assert_owner(self):
        for name in os.listdir(self.run):
            info = os.lstat(os.path.join(self.run, name))
            self.assertEqual(base.NOBODY, info.st_uid, name)

    def test_root_comes_second(self):
        service = self.publisher(uid=base.NOBODY)
        service.wait_log('served')
        root = self.publisher()
        self.assert_heard([root, service])
        self._assert_owner()
        self.assertEqual([], root.troubles())
        # The service is restarted; root never takes its place.
        for _ in range(3):
            service.kill()
            service.wait_exit()
            root.ask('emit', count=3)
            service = self.publisher(uid=base.NOBODY)
            service.wait_log('served')
            subscriber = self.subscribe()
            self.assert_heard([root, service], subscriber)
            self._assert_owner()

    def test_root_comes_first(self):
        root = self.publisher()
        root.ask('emit', count=3)
        root.wait_log('root does not serve')
        self.assertEqual([], os.listdir(self.run))
        service = self.publisher(uid=base.NOBODY)
        subscriber = self.subscribe()
        self.assert_heard([root, service], subscriber)
        self._assert_owner()

    def test_root_comes_for_a_moment(self):
        root = self.publisher()
        root.tell('leave', count=3)
        self.assertEqual(0, root.wait_exit())
        self.assertLess(root.exit_seconds(), 0.5)
        self.assertEqual([], os.listdir(self.run))

    def test_root_emits_while_the_leader_changes(self):
        workers = [self.publisher(uid=base.NOBODY) for _ in range(2)]
        root = self.publisher()
        for _ in range(3):
            self.assert_heard(workers + [root])
            leader = self.wait_leader(workers)
            workers.remove(leader)
            base.stop(leader.pid)
            waiting = self.subscribe()
            leader.kill()
            leader.wait_exit()
            root.ask('emit', count=10)
            waiting.wait_end()
            waiting.close()
            base.wait_heir(self.path, leader.pid)
            with contextlib.closing(self.subscribe()) as subscriber:
                root.ask('emit', count=10)
                # It may get some that were on their way, too.
                subscriber.wait(10)
            workers.append(self.publisher(uid=base.NOBODY))

    def test_foreign_follower_is_told_nothing(self):
        service = self.publisher(uid=base.NOBODY)
        service.wait_log('served')
        base.wait_until(lambda: os.path.exists(self.relay), 'relay')
        arguments = (self.relay, '%d' % STRANGER)
        stranger = self.start(CONNECT, *arguments)
        self.assertEqual('PermissionError\n', stranger.stdout.read())
        # Were it not for the mode:
        os.chmod(self.relay, 0o666)
        stranger = self.start(CONNECT, *arguments)
        self.assertEqual("b''\n", stranger.stdout.read())
        self.assertEqual(1, len(service.log(
            'pid %d, uid %d: not trusted' % (stranger.pid, STRANGER))))
        self.assert_heard([service])

    def test_foreign_leader_is_told_nothing(self):
        os.chmod(self.run, 0o777)
        fake = self.start(FAKE, self.path, '%d' % STRANGER)
        fake.stdin.close()
        base.wait_until(lambda: os.path.exists(self.relay), 'relay')
        # Each on its own terms, root for one.
        for uid in (base.NOBODY, None):
            service = self.publisher(uid=uid)
            service.ask('emit', count=3)
            self.assertEqual("b''\n", fake.stdout.readline())
            line = service.wait_log('not trusted')
            self.assertIn('uid %d' % STRANGER, line)
            self.assert_never(lambda: len(service.log('not trusted')) > 1,
                              'told again', 1)
            service.close()


class ProtocolTest(PeersTestCase):

    def _connect(self):
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.settimeout(base.PATIENCE)
        sock.connect(self.relay)
        hello = sock.recv(1000)     # the descriptors are dropped
        self.assertTrue(hello.startswith(HELLO.strip()), hello)
        return sock

    def _assert_cut_off(self, *texts):
        sock = self._connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for text in texts:
                sock.sendall(text)
            self.assertEqual(b'', sock.recv(1000))
        sock.close()

    def _leader(self):
        leader = self.publisher()
        leader.wait_log('served')
        base.wait_until(lambda: os.path.exists(self.relay), 'relay')
        return leader

    def test_nonsense(self):
        leader = self._leader()
        subscriber = self.subscribe()
        for nonsense in (b'GET / HTTP/1.1\r\n\r\n', b'\n', b'\0\n',
                         LINE, b'-1 stalled\n',
                         HELLO.replace(b'2', b'3') + LINE,
                         HELLO + b'-\n', HELLO + b'-x y\n',
                         HELLO + b'--5 y\n', HELLO + b'-1\n',
                         HELLO + b'-1 \xff\n'):
            self._assert_cut_off(nonsense)
        # Nothing of that was relayed, and nobody was harmed.
        self.assert_heard([leader], subscriber)
        sock = self._connect()
        sock.sendall(HELLO + LINE[:20])
        sock.sendall(LINE[20:])
        subscriber.wait(2)
        sock.sendall(b'-5 stalled\n')
        subscriber.wait(7)
        self.assertEqual((2, 5), (subscriber.received, subscriber.lost))
        sock.sendall(LINE[:20])     # and is gone in the middle of it
        sock.close()
        self.assert_heard([leader], self.subscribe())

    def test_losses_without_end(self):
        leader = self._leader()
        subscriber = self.subscribe()
        sock = self._connect()
        sock.sendall(HELLO + b'-1 stalled\n' * 50000 + LINE
                     + b'-%s stalled\n' % (b'9' * 19))
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(b'', sock.recv(1000))
        subscriber.wait(50001)
        self.assertEqual((1, 50000), (subscriber.received, subscriber.lost))
        self.assertLess(len(subscriber.reasons), 1000)
        self.assertEqual(1, len(leader.log('relay refused')))
        self.assert_heard([leader])

    def test_endless_line(self):
        leader = self._leader()
        before = base.memory(leader.pid)
        block = b'x' * base.MIB
        sock = self._connect()
        # Before the hello a little is a lot.
        with self.assertRaises(OSError):
            for _ in range(4):
                sock.sendall(block)
        self.assertLess(base.memory(leader.pid) - before, 4 * base.MIB)
        self._assert_cut_off(HELLO, b'{', *[block] * 80)
        self.assert_heard([leader])

    def test_silent_peers(self):
        leader = self._leader()
        descriptors = base.descriptors(leader.pid)
        for _ in range(300):
            self._connect().close()
        silent = [self._connect() for _ in range(20)]
        self.assert_heard([leader])
        for sock in silent:
            sock.close()
        base.wait_until(lambda: base.descriptors(leader.pid) == descriptors,
                        'descriptors as before')

    def _assert_calm(self, processes):
        """They do not quarrel."""
        before = [base.cpu_seconds(process.pid) for process in processes]
        end = time.monotonic() + 1
        self.assert_never(
            lambda: max(base.cpu_seconds(process.pid) - cpu for
                        process, cpu in zip(processes, before)) > 0.3,
            'CPU time is spent', end - time.monotonic())

    def _other(self):
        """A publisher whose relay has another protocol number."""
        directory = self.module('unix_notifier', (
            'unix-notifier relay 2', 'unix-notifier relay 3'))
        program = os.path.join(self.directory, 'other.py')
        with open(program, 'w') as file:
            file.write(OTHER % [directory,
                                os.path.dirname(base.PUBLISHER)])
        return self.publisher(program=(program,))

    def test_other_protocol_number(self):
        leader = self._leader()
        other = self._other()
        other.wait_log('protocol')
        other.ask('emit', count=10)
        self._assert_calm([leader, other])
        self.assert_heard([leader])
        for process in (leader, other):
            self.assertGreaterEqual(1, len(process.log('protocol')))
        # Its turn.
        leader.tell('leave')
        leader.wait_exit()
        other.wait_log('served')
        self.assert_heard([other])
        late = self.publisher()
        late.wait_log('protocol')
        late.ask('emit', count=10)
        self._assert_calm([late, other])
        self.assert_heard([other])

    def _assert_not_followed(self, answer, passed, word):
        fake = self.start(FAKE, self.path, '%d' % os.geteuid(), passed)
        fake.stdin.write(answer)
        fake.stdin.close()
        base.wait_until(lambda: os.path.exists(self.relay), 'relay')
        service = self.publisher()
        service.wait_log(word)
        before = base.descriptors(service.pid)
        service.ask('emit', count=10)
        self._assert_calm([service])
        self.assertLess(base.descriptors(service.pid), before + 3)
        self.assertEqual(1, len(service.log(word)))
        self.assertGreaterEqual(1, len(service.log('relayed to')))
        fake.kill()
        fake.wait()
        self.assert_heard([service])

    def test_leader_that_talks_nonsense(self):
        self._assert_not_followed('hello\n', 'none', 'protocol')

    def test_leader_that_passes_what_is_no_socket(self):
        self._assert_not_followed(WELCOME, 'file', 'protocol')

    def test_leader_that_greets_and_hangs_up(self):
        self._assert_not_followed(WELCOME, 'socket', 'hangs up each time')


class LockTest(PeersTestCase):

    def test_who_may_but_read_the_lock_can_hold_it(self):
        first = self.publisher()
        first.wait_log('served')
        first.kill()
        first.wait_exit()
        with open(self.path + '.lock') as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            service = self.publisher()
            service.wait_log('held; its last owner was process %d' % first.pid)
            service.ask('emit', count=10)
        service.wait_log('served')
        self.assert_heard([service])


class CopyTest(PeersTestCase):

    def test_two_copies_of_the_module_in_one_process(self):
        directory = self.module('vendored', ('Path of the socket', 'A path'))
        two = self.start(TWO, self.path, directory)
        with contextlib.closing(self.subscribe()) as early:
            # Once this is here nothing is on its way any more.
            two.stdin.write('10\n')
            two.stdin.flush()
            two.stdout.readline()
            early.wait(20)
        other = self.publisher()
        other.wait_log('relayed')
        subscriber = self.subscribe()
        for number in range(1, 21):
            two.stdin.write('50\n')
            two.stdin.flush()
            other.ask('emit', count=10)
            two.stdout.readline()
        self.assert_complete(subscriber, 20 * 110)
        two.stdin.close()
        self.assertEqual(0, two.wait(base.PATIENCE))
        # One of them led, and both are gone.
        self.assert_heard([other])


class ShortLivedTest(PeersTestCase):

    COMMAND = os.path.join(os.path.dirname(sys.executable),
                           'oslo-messaging-send-notification')

    def _send(self, count):
        """Have as many processes send one each."""
        config_file = os.path.join(self.directory, 'send.conf')
        with open(config_file, 'w') as config:
            config.write('[oslo_messaging_notifications]\nsock_path = %s\n'
                         % self.path)
        processes = [subprocess.Popen(
            [self.COMMAND, '--config-file', config_file, '--transport-url',
             'fake://', '--driver', 'unix', '--event-type', 'sent',
             '--publisher-id', 'sender', '%d' % number],
            stderr=subprocess.PIPE) for number in range(count)]
        for process in processes:
            error = process.communicate(timeout=base.PATIENCE)[1]
            self.assertEqual(0, process.returncode, error)

    def setUp(self):
        super().setUp()
        if not os.path.exists(self.COMMAND):
            self.COMMAND = shutil.which(os.path.basename(self.COMMAND))

    def test_beside_a_leader(self):
        leader = self.publisher()
        subscriber = self.subscribe()
        self._send(4)
        self.assert_complete(subscriber, 4)
        self.assertEqual(
            ['0', '1', '2', '3'],
            sorted(message['payload'] for message in subscriber.messages))
        self.assert_heard([leader], subscriber)

    def test_alone(self):
        self._send(1)
        self.assertEqual(['s.lock'], os.listdir(self.run))
        # Together they may hand over from one to the other.
        self._send(3)
        leader = self.publisher()
        self.assert_heard([leader])
