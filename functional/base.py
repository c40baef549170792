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

"""What the functional tests share: publishers, subscribers, bounded waits.

A publisher is a process of its own that runs publisher.py. A subscriber is
read by a thread of the test, directly or through a client program, and
checks what it reads. Whatever a test starts is ended when the test ends.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

from oslotest import base
from testtools import content

import unix_notifier

PUBLISHER = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                         'publisher.py')
# Seconds that anything may take that should take milliseconds.
PATIENCE = 20
# Seconds that a process grants a reader that makes no progress as it exits.
# One that got no CPU for so long is not told from one that is stalled.
EXIT_STALL = 0.1
# A user without any rights.
NOBODY = 65534
MIB = 1024 * 1024
# A client that takes little time to start; its argument is the path.
CAT = [sys.executable, '-S', '-E', '-c', """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
while True:
    data = memoryview(sock.recv(65536))
    if not data:
        break
    while data:
        data = data[os.write(1, data):]
"""]
_CONFIG = """\
[DEFAULT]
transport_url = fake://

[oslo_messaging_notifications]
driver = unix
"""


def wait_until(predicate, what, timeout=PATIENCE):
    """Wait until the predicate holds.

    :param what: what is waited for, in words, or a function that tells
    :returns: the value of the predicate
    :raises: AssertionError if it still does not hold after ``timeout``
    """
    deadline = time.monotonic() + timeout
    while True:
        # First, for the last look must not come before the deadline.
        late = time.monotonic() > deadline
        value = predicate()
        if value:
            return value
        if late:
            raise AssertionError('Not within %s s: %s' % (
                timeout, what() if callable(what) else what))
        time.sleep(0.005)


# -- what the kernel knows of a process -------------------------------------

def status(pid, path='/proc/%d/status'):
    """The fields of /proc/PID/status."""
    with open(path % pid) as lines:
        return dict(line.rstrip('\n').split(':\t', 1)
                    for line in lines if ':\t' in line)


def memory(pid):
    """The resident set, in bytes."""
    return int(status(pid)['VmRSS'].split()[0]) * 1024


def switches(pid):
    """How often threads of the process were given, or gave up, the CPU."""
    total = 0
    for task in os.listdir('/proc/%d/task' % pid):
        fields = status(pid, '/proc/%%d/task/%s/status' % task)
        total += int(fields['voluntary_ctxt_switches'])
        total += int(fields['nonvoluntary_ctxt_switches'])
    return total


def descriptors(pid):
    """The number of open descriptors."""
    return len(os.listdir('/proc/%d/fd' % pid))


def cpu_seconds(pid):
    """CPU time of the process, in steps of 10 ms."""
    with open('/proc/%d/stat' % pid) as stat:
        fields = stat.read().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def open_files(pid):
    """The names of what the process has open, sorted."""
    names = []
    for number in os.listdir('/proc/%d/fd' % pid):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink('/proc/%d/fd/%s' % (pid, number)))
    return sorted(names)


def stop(pid):
    """Stop the process, until it is sent SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: status(pid)['State'].startswith('T'),
               '%d is stopped' % pid)


def python_path():
    """Where processes find the packages, and the programs of the tests."""
    return [path for path in sys.path if os.path.isdir(path)
            and path.endswith('-packages')] + [
                os.path.dirname(os.path.abspath(__file__))]


# -- subscribers ------------------------------------------------------------

def _no_json(constant):
    raise ValueError('%s is not JSON' % constant)   # but Python takes it


class Account:

    """Checks the lines of a stream, and keeps count of them.

    ``feed()`` takes the bytes. What breaks a promise is noted in
    ``problems``: a line that is no notification, one that came before, one
    that is out of order, a number left out for which no loss was reported in
    its place. ``received + lost`` is what is to equal what was emitted.
    """

    KEYS = {'message_id', 'publisher_id', 'event_type', 'priority',
            'payload', 'timestamp'}

    def __init__(self):
        self.messages = []      # the notifications, without their padding
        self.received = 0       # how many that are
        self.lost = 0           # sum of the records
        self.reasons = []       # of the records
        self.refused = None     # the reason, if so
        self.problems = []
        self._ids = set()
        self._sources = {}      # source: last number, and lost at that point
        self._rest = []         # what came after the last LF

    @property
    def rest(self):
        """What came after the last LF."""
        return b''.join(self._rest)

    @property
    def total(self):
        return self.received + self.lost

    def feed(self, data):
        first, *others = data.split(b'\n')
        self._rest.append(first)
        if not others:
            return
        lines = [b''.join(self._rest), *others[:-1]]
        self._rest = others[-1:]
        for line in lines:
            try:
                self._take(line)
            except Exception as error:
                self.problems.append('%r: %.200r' % (error, line))

    def _take(self, line):
        message = json.loads(line.decode('ascii'), parse_constant=_no_json)
        if set(message) != self.KEYS:
            raise ValueError('wrong keys')
        if message['message_id'] in self._ids:
            raise ValueError('came twice')
        self._ids.add(message['message_id'])
        if self.refused is not None:
            raise ValueError('came after the refusal')
        payload = message['payload']
        if message['event_type'] == 'notifications.refused':
            self.refused = payload['reason']
        elif message['event_type'] == 'notifications.lost':
            self.lost += payload['lost']
            self.reasons.append(payload['reason'])
            if payload['lost'] < 1:
                raise ValueError('nothing lost')
        else:
            self.messages.append(message)
            if 'source' in payload:
                payload.pop('pad')
                self._follow(payload['source'], payload['number'])
            # Last: other threads wait for it.
            self.received += 1

    def _follow(self, source, number):
        last, lost = self._sources.get(source, (None, 0))
        self._sources[source] = number, self.lost
        if last is None:
            return
        if number <= last:
            raise ValueError('comes after number %d' % last)
        owed = number - self._owed_after(source, last) - 1
        if owed > self.lost - lost:
            raise ValueError('comes after number %d, and only %d of %d were '
                             'reported lost in between' % (
                                 last, self.lost - lost, owed))

    def _owed_after(self, source, last):
        """From which number on must come what comes after the last one."""
        return last


class Subscriber(Account):

    """Reads a stream in a thread."""

    def __init__(self, receive, who):
        """Do nothing yet: see ``go()``.

        :param receive: returns the next bytes, none at the end of stream
        :param who: the name in messages
        """
        super().__init__()
        self.who = who
        self.ended = threading.Event()
        self._receive = receive
        self._thread = None

    def __str__(self):
        return '%s (received %d, lost %d, refused %r, ended %s)' % (
            self.who, self.received, self.lost, self.refused,
            self.ended.is_set())

    def go(self):
        """Start to read."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while data := self._receive():
                self.feed(data)
        except ConnectionResetError:
            pass
        finally:
            self.ended.set()

    def wait(self, total, timeout=PATIENCE):
        """Wait until what was received and what was lost add up to it."""
        wait_until(lambda: self.total >= total or self.ended.is_set(),
                   lambda: 'a total of %d by %s' % (total, self), timeout)

    def wait_end(self, timeout=PATIENCE):
        """Wait for the end of stream."""
        wait_until(self.ended.is_set, lambda: 'end of stream at %s' % self,
                   timeout)

    def join(self):
        if self._thread is not None:
            self._thread.join(PATIENCE)


class SocketSubscriber(Subscriber):

    """A subscriber that is connected by a socket of the test."""

    size = MIB      # that it receives at a time

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            self._connect(path)
        except BaseException:
            self.sock.close()
            raise
        super().__init__(lambda: self.sock.recv(self.size),
                         'socket %d' % self.sock.fileno())

    def _connect(self, path):
        def connected():
            try:
                self.sock.connect(path)
                return True
            except (FileNotFoundError, ConnectionRefusedError):
                return False    # not yet

        wait_until(connected, 'connected to %s' % path)

    def close(self):
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)    # ends recv()
        self.join()
        self.sock.close()


class Client(Subscriber):

    """A subscriber that is connected by a program, and reads its output."""

    def __init__(self, arguments, **kwargs):
        self.process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, start_new_session=True,
            **kwargs)
        self.pid = self.process.pid
        super().__init__(
            lambda: os.read(self.process.stdout.fileno(), MIB),
            '%s, pid %d' % (arguments[0], self.pid))
        self.go()

    def stop(self):
        stop(self.pid)

    def resume(self):
        os.kill(self.pid, signal.SIGCONT)

    def close(self):
        _kill_session(self.process)
        self.join()
        self.process.stdout.close()


def _kill_session(process):
    """Kill a process and what it has started.

    As long as it was not waited for, its number can be no one else's.
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)


# -- publishers -------------------------------------------------------------

class Controlled:

    """A process that acts on commands; see publisher.py."""

    def __init__(self, pid, reading, writing):
        self.pid = pid
        self._reading = reading     # descriptors
        self._writing = writing
        self._data = b''

    def ask(self, command, timeout=PATIENCE, **arguments):
        """Have a command done, and return its result."""
        self.tell(command, **arguments)
        return self.answer(timeout)

    def tell(self, command, **arguments):
        """Have a command done; ``answer()`` may follow."""
        data = json.dumps([command, arguments]).encode('ascii') + b'\n'
        os.write(self._writing, data)

    def answer(self, timeout=PATIENCE):
        """The result of the oldest command that was not answered.

        :raises: AssertionError if the command failed or takes too long
        """
        deadline = time.monotonic() + timeout
        while b'\n' not in self._data:
            left = max(0, deadline - time.monotonic())
            if not select.select([self._reading], [], [], left)[0]:
                raise AssertionError('No answer from %d' % self.pid)
            data = os.read(self._reading, 65536)
            if not data:
                raise AssertionError('%d has ended' % self.pid)
            self._data += data
        line, _, self._data = self._data.partition(b'\n')
        answer = json.loads(line)
        if 'error' in answer:
            raise AssertionError(answer['error'])
        return answer['result']

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)


class Publisher(Controlled):

    """A process that runs publisher.py."""

    def __init__(self, directory, options, arguments=(),
                 program=(PUBLISHER,), lines=()):
        self.name = tempfile.mktemp(prefix='p', dir='')
        config_file = os.path.join(directory, self.name + '.conf')
        with open(config_file, 'w') as config:
            config.write(_CONFIG + ''.join(
                'sock_%s = %s\n' % pair for pair in options.items())
                + '\n'.join(lines))
        self._log = os.path.join(directory, self.name + '.log')
        with open(self._log, 'wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, config_file, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True)
        super().__init__(self.process.pid, self.process.stdout.fileno(),
                         self.process.stdin.fileno())

    def log(self, text=''):
        """The lines of the log that contain the text."""
        with open(self._log, errors='replace') as log:
            return [line for line in log.read().splitlines() if text in line]

    def wait_log(self, text, timeout=PATIENCE):
        """Wait until a line of the log contains the text; return it."""
        return wait_until(
            lambda: self.log(text),
            lambda: '%r in the log:\n%s' % (text, '\n'.join(self.log())),
            timeout)[0]

    def visits(self, event):
        """How many subscribers the log names or counts as connected, say."""
        text = '\n'.join(self.log('subscriber'))
        return (len(re.findall('subscriber %s: ' % event, text))
                + sum(map(int, re.findall(event + r': (\d+)[,;]', text))))

    def troubles(self):
        """The lines of the log that want to be looked at."""
        return [line for line in self.log(' unix_notifier ')
                if not line.startswith(('INFO', 'DEBUG'))]

    def wait_exit(self, timeout=PATIENCE):
        """Wait until the process has ended; return its exit status.

        It stays a zombie, so that what it has left behind can be found.
        """
        result = wait_until(
            lambda: os.waitid(os.P_PID, self.pid,
                              os.WEXITED | os.WNOHANG | os.WNOWAIT),
            'publisher %d has ended' % self.pid, timeout)
        return (result.si_status if result.si_code == os.CLD_EXITED
                else -result.si_status)

    def exit_seconds(self, pid=None):
        """How long the exit handlers took, of a process that has ended.

        :param pid: of a child that it has forked, or its own
        """
        line, = self.log('exit handlers of %d took' % (pid or self.pid))
        return float(line.split()[-2])

    def close(self):
        _kill_session(self.process)
        self.process.stdin.close()
        self.process.stdout.close()


class Child(Controlled):

    """A process that a publisher has forked."""

    def __init__(self, pid, sock):
        self._sock = sock
        super().__init__(pid, sock.fileno(), sock.fileno())

    def close(self):
        self._sock.close()


def fork(directory, parent, how, command='fork', **arguments):
    """Have a publisher fork; see there. Returns the child.

    :param directory: where to put the socket by which it is told what to do
    """
    control = os.path.join(directory, 'control')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PATIENCE)
        listener.bind(control)
        listener.listen(1)
        pid = parent.ask(command, how=how, control=control, **arguments)
        child = Child(pid, listener.accept()[0])
    os.unlink(control)
    return child


def leader_pid(path):
    """The pid of the process that leads, or was killed as it led."""
    try:
        with open(path + '.lock') as lock:
            return json.load(lock)['pid']
    except (OSError, ValueError):
        return None     # nobody, or it is being written


def wait_heir(path, pid):
    """Wait until another process than the one that was killed leads.

    Who connects sooner waits at the dead one's listener, and is let go.
    """
    wait_until(lambda: leader_pid(path) not in (None, pid),
               'another than %d leads' % pid)


class FunctionalTestCase(base.BaseTestCase):

    """Gives each test a directory, publishers and subscribers."""

    # Seconds, unless OS_TEST_TIMEOUT says otherwise: a hang is a failure.
    DEFAULT_TIMEOUT = 90

    def setUp(self):
        super().setUp()
        # TMPDIR may be too long for the path of a socket.
        self.directory = tempfile.mkdtemp(prefix='un-', dir='/tmp')
        self.addCleanup(shutil.rmtree, self.directory)
        os.chmod(self.directory, 0o711)     # other users may pass
        os.mkdir(os.path.join(self.directory, 'run'))
        self.path = os.path.join(self.directory, 'run', 's')

    def publisher(self, is_open=True, **options):
        """Start a publisher; see ``publishers()``.

        :param is_open: whether it makes its Notifier at once
        """
        publisher = self._launch(**options)
        if is_open:
            publisher.ask('open')
        return publisher

    def publishers(self, *options):
        """Start some at once, which takes less time than one by one.

        :param options: a dict for each: of the driver, less ``sock_``;
                        ``uid`` and ``umask`` of the process; ``tracebacks``,
                        whether its log may have any; ``program``, what to
                        run, which acts as publisher.py does; ``lines``, to
                        be added to its section of the configuration
        """
        publishers = [self._launch(**each) for each in options]
        for publisher in publishers:
            publisher.tell('open')
        for publisher in publishers:
            publisher.answer()
        return publishers

    def _launch(self, uid=None, umask=None, tracebacks=False,
                program=(PUBLISHER,), lines=(), **options):
        arguments = []
        if uid is not None:
            self.need_readable_modules(uid)
            arguments += ['--uid', '%d' % uid]
        if umask is not None:
            arguments += ['--umask', '%o' % umask]
        settings = dict(options)
        settings.setdefault('path', self.path)
        publisher = Publisher(self.directory, settings, arguments, program,
                              lines)
        self.addCleanup(self._finish, publisher, tracebacks)
        return publisher

    def need_readable_modules(self, uid):
        """Skip the test where the user may not read what it is to import.

        The module may be found elsewhere here than in a process that is
        started, for the checkout comes first.
        """
        paths = [*python_path(), os.path.dirname(unix_notifier.__file__)]
        if subprocess.run(
                ['ls', *paths], user=uid, group=uid, extra_groups=[],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL).returncode:
            self.skipTest('user %d may not read where Python is' % uid)

    def _finish(self, publisher, tracebacks):
        publisher.close()
        log = publisher.log()
        self.addDetail('log of %d' % publisher.pid,
                       content.text_content('\n'.join(log)))
        if not tracebacks:
            self.assertEqual([], publisher.log('Traceback'))
        self.assertEqual([], publisher.log('unclosed <socket'))

    def fork(self, parent, how, command='fork', **arguments):
        """Have a publisher fork; see there. Returns the child."""
        child = fork(self.directory, parent, how, command, **arguments)
        self.addCleanup(child.close)
        return child

    def subscribe(self, path=None, go=True):
        """Connect, as soon as the path is served, and read, or not yet."""
        subscriber = SocketSubscriber(path or self.path)
        self.addCleanup(self._check, subscriber)
        self.addCleanup(subscriber.close)
        if go:
            subscriber.go()
        return subscriber

    def client(self, arguments, **kwargs):
        """Start a program that connects, and read its output."""
        client = Client(arguments, **kwargs)
        self.addCleanup(self._check, client)
        self.addCleanup(client.close)
        return client

    def cat(self, publisher, path=None, **kwargs):
        """Start a client, and wait until the publisher has accepted it."""
        client = self.client(CAT + [path or self.path], **kwargs)
        publisher.wait_log('connected: pid %d,' % client.pid)
        return client

    def _check(self, subscriber):
        self.assertEqual([], subscriber.problems, subscriber)

    def emit_in_rounds(self, publisher, reader, rounds, count=100):
        """Emit 1 KB each, no faster than the reader reads; how many."""
        for _ in range(rounds):
            total = reader.total + count
            publisher.ask('emit', count=count, size=1000)
            reader.wait(total)
        return rounds * count

    def assert_complete(self, subscriber, emitted):
        """Fail unless all that was emitted was received."""
        subscriber.wait(emitted)
        self.assertEqual((emitted, 0), (subscriber.received, subscriber.lost),
                         subscriber)

    def assert_accounted(self, subscriber, emitted):
        """Fail unless what was not received was reported as lost."""
        subscriber.wait(emitted)
        self.assertEqual(emitted, subscriber.total, subscriber)

    def assert_never(self, predicate, what, seconds=0.5):
        """Fail if the predicate comes to hold within some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.assertFalse(predicate(), what)
            time.sleep(0.005)


class RelayTestCase(FunctionalTestCase):

    """Gives each test processes that share one path.

    They are forked from one that has loaded all they need and emits nothing,
    for that takes milliseconds.
    """

    def start_workers(self, count, **options):
        """Start processes with a Notifier each, of which the first leads."""
        self.parent = self.publisher(is_open=False, **options)
        self.parent.ask('load')
        workers = [self.worker()]
        self.wait_leader(workers)
        return workers + [self.worker() for _ in range(count - 1)]

    def worker(self, is_open=True):
        """Start one more."""
        worker = self.fork(self.parent, 'fork')
        if is_open:
            worker.ask('open')
        return worker

    def leader_pid(self):
        """See the function."""
        return leader_pid(self.path)

    def wait_leader(self, workers):
        """Wait until one of the workers leads, and return that one."""
        def leader():
            pid = self.leader_pid()
            return [each for each in workers if each.pid == pid]

        return wait_until(leader, 'one of %s leads' % [
            each.pid for each in workers])[0]

    def wait_idle(self, workers):
        """Wait until they sleep, and stay asleep for a moment."""
        def idle():
            before = [switches(worker.pid) for worker in workers]
            time.sleep(0.02)
            return before == [switches(worker.pid) for worker in workers]

        wait_until(idle, 'workers are idle')

    def kill_worker(self, worker, number=signal.SIGKILL):
        """Kill a worker, and wait until it has ended."""
        worker.kill(number)
        return self.parent.ask('reap', pid=worker.pid)
