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

"""A service to be tested: a real Notifier, which acts on commands.

    publisher.py CONFIG_FILE [--uid UID] [--umask UMASK]

It reads commands from stdin and answers each on stdout, both in lines of
JSON: ``["emit", {"count": 3}]``, then ``{"result": ...}`` or ``{"error":
"..."}``. A command is a public method of ``Service``. The log goes to stderr.
A child that it forks connects to a Unix socket, by which it is told what to
do in the same way.

What it emits can be accounted for: the payload names its source (process and
thread) and counts from 1 for each source.
"""

import argparse
import atexit
import collections
import contextlib
import ctypes
import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time

from oslo_config import cfg
from oslo_context import context
import oslo_messaging
from stevedore import extension

NOTIFICATIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                             'notifications.ndjson')
PRIORITIES = ('audit', 'debug', 'info', 'warn', 'error', 'critical',
              'sample')
# Seconds.
PATIENCE = 20
CLONE_NEWPID = 0x20000000


class Service:

    """What a service does with its Notifier, a method for each command."""

    def __init__(self, config_file):
        self.config_file = config_file
        self.conf = cfg.ConfigOpts()
        self.conf(['--config-file', config_file], project='publisher')
        self.notifier = None
        self.notifiers = {}         # by topic, of emit_events
        self.ctxt = {}              # of what is emitted
        self.end = None             # how to end, once told to
        self.in_child = False
        self.numbers = collections.Counter()    # emitted so far, by source
        self.background = []        # threads
        self.stopping = threading.Event()
        self.held = []              # descriptors
        self.served = {}            # by the fork server, by pid
        self.probes = []

    def serve(self, commands, answers):
        """Do what the lines of a file say, until its end or ``leave``."""
        for line in commands:
            name, arguments = json.loads(line)
            try:
                answer = {'result': getattr(self, name)(**arguments)}
            except Exception as error:
                logging.getLogger('publisher').exception('Failed: %s', line)
                answer = {'error': repr(error)}
            if self.end:
                break
            answers.write(json.dumps(answer) + '\n')
            answers.flush()

    # Emitting.

    def load(self):
        """Import the drivers, so that children need not."""
        extension.ExtensionManager('oslo.messaging.notify.drivers')

    def open(self, topics=None):
        """Make the Notifier, which starts the driver.

        Once more: another, by which all is emitted from then on.
        """
        transport = oslo_messaging.get_notification_transport(self.conf)
        self.notifier = oslo_messaging.Notifier(
            transport, publisher_id='test.%d' % os.getpid(), topics=topics)
        # Handlers run in reverse order: this comes before the driver's.
        atexit.register(_exit_begins)

    def emit(self, count, threads=1, size=0, pause=0, ctxt=None):
        """Emit ``count`` notifications in each thread.

        :param ctxt: arguments of the request context, if there is to be one
        :returns: seconds that all calls and that the slowest one took
        """
        self.ctxt = {} if ctxt is None else context.RequestContext(**ctxt)
        begin = time.perf_counter()
        if threads == 1:
            slowest = self._emit(0, range(count), size, pause)
        else:
            results = []
            _in_threads(threads, lambda index: results.append(
                self._emit(index, range(count), size, pause)))
            slowest = max(results)
        return {'seconds': time.perf_counter() - begin, 'slowest': slowest}

    def _emit(self, index, times, size=0, pause=0):
        source = '%d/%d' % (os.getpid(), index)
        slowest, pad = 0, 'x' * size
        for _ in times:
            number = self.numbers[source] + 1
            method = getattr(self.notifier,
                             PRIORITIES[number % len(PRIORITIES)])
            payload = {'source': source, 'number': number, 'pad': pad}
            begin = time.perf_counter()
            method(self.ctxt, 'test.event', payload)
            slowest = max(slowest, time.perf_counter() - begin)
            self.numbers[source] = number
            if pause:
                time.sleep(pause)
        return slowest

    def emit_real(self):
        """Emit the notifications of notifications.ndjson."""
        with open(NOTIFICATIONS) as lines:
            for message in map(json.loads, lines):
                emitter = self.notifier.prepare(
                    publisher_id=message['publisher_id'])
                method = getattr(emitter, message['priority'].lower())
                method({}, message['event_type'], message['payload'])

    def emit_events(self, events, ctxt=None, pause=0):
        """Emit events: topic, publisher_id, event_type and payload of each.

        :param ctxt: arguments of the request context, if there is to be one
        """
        ctxt = {} if ctxt is None else context.RequestContext(**ctxt)
        for topic, publisher_id, event_type, payload in events:
            emitter = self.notifiers.get(topic)
            if emitter is None:
                self.open([topic])
                emitter = self.notifiers[topic] = self.notifier
            emitter.prepare(publisher_id=publisher_id).info(
                ctxt, event_type, payload)
            time.sleep(pause)

    def start(self, threads=1, size=0, pause=0):
        """Emit without end in threads, from number 1 on, until ``stop``."""
        self.stopping.clear()

        def run(index):
            self._emit(index, iter(self.stopping.is_set, True), size, pause)

        for index in range(1, threads + 1):
            thread = threading.Thread(target=run, args=(index,), daemon=True)
            thread.start()
            self.background.append(thread)

    def stop(self):
        """End ``start``.

        :returns: how many this process has emitted in all
        """
        self.stopping.set()
        for thread in self.background:
            thread.join()
        self.background.clear()
        return self.emitted()

    def hurry(self, interval=1e-4):
        """Have busy threads give up the GIL soon, for there are many."""
        sys.setswitchinterval(interval)

    def emitted(self):
        """How many notifications this process has emitted, its own kind."""
        prefix = '%d/' % os.getpid()
        return sum(number for source, number in self.numbers.items()
                   if source.startswith(prefix))

    def rounds(self, count, path, threads=1):
        """Connect and emit one at once, which must arrive; over and over.

        Here, in the process that emits, nothing gives the driver time to
        accept the subscriber. More threads make for more chances that it is
        about to accept others, or has just done so.

        :returns: the rounds that failed, with the reason
        """
        failed = []

        def run(index):
            for number in range(count):
                try:
                    self._round(path, index)
                except (OSError, ValueError) as error:
                    failed.append([number, repr(error)])
                    break

        _in_threads(threads, run)
        return failed

    def _round(self, path, index):
        source = '%d/%d' % (os.getpid(), index)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(path)
            self._emit(index, range(1))
            self._expect(sock, b'"source": "%s", "number": %d,' % (
                source.encode('ascii'), self.numbers[source]))

    @staticmethod
    def _expect(sock, text):
        """Read on until the text, without parsing: there may be much else."""
        data = b''
        while text not in data:
            more = sock.recv(65536)
            data = data[-200:] + more
            if not more or b'"notifications.' in data:
                raise ValueError(data)

    def queued(self):
        """How many entries wait in the queues of the driver."""
        hubs = sys.modules['unix_notifier']._hubs[os.getpid()]
        return sum(len(hub.inbox.lines) for hub in hubs.values())

    def log_to(self, path):
        """From now on, as a service does that sets up its log late."""
        set_up_logging(filename=path, force=True)

    # Descriptors.

    def limit_descriptors(self, number):
        """Set the limit; the numbers below it may all be taken already."""
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))

    def exhaust(self):
        """Take all the descriptors there are."""
        try:
            while True:
                self.held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return len(self.held)

    def release(self):
        """Give back what ``exhaust`` took."""
        while self.held:
            os.close(self.held.pop())

    # Watching.

    def probe(self, path):
        """From now on, have a look whenever the path is about to change.

        That is before bind(), and between bind() and what gives the socket
        its mode and group. ``probed()`` tells what was found: the event, the
        error that a connect() got, and the umask.
        """
        def hook(event, arguments):
            if event in ('socket.bind', 'os.chmod', 'os.chown') and (
                    path in map(_real_path, arguments)):
                with socket.socket(socket.AF_UNIX) as sock:
                    code = sock.connect_ex(path)
                with open('/proc/self/status') as lines:
                    umask, = (line.split()[1] for line in lines
                              if line.startswith('Umask:'))
                self.probes.append([event, errno.errorcode.get(code), umask])

        sys.addaudithook(hook)

    def probed(self):
        """What the probes have found."""
        return self.probes

    # Processes.

    def handle_sigterm(self):
        """Have SIGTERM end the process in good order, as services do."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    def fork(self, how, control):
        """Start a child, which takes its commands from a Unix socket.

        :param how: fork (os.fork), multiprocessing (forked), thread (the
                    same, from a thread that is not the main one), forkserver
                    and spawn (also multiprocessing's), bare (as programs in C
                    do, so that no hooks are run), namespace (os.fork, as
                    process 1 of a new one)
        :param control: path of the socket that the child connects to
        :returns: the pid of the child
        """
        if how in ('fork', 'bare', 'namespace'):
            if how == 'namespace' and ctypes.CDLL(None).unshare(CLONE_NEWPID):
                raise PermissionError('unshare')
            pid = ctypes.PyDLL(None).fork() if how == 'bare' else os.fork()
            if not pid:
                self.be_child(control)
                sys.exit(0)
            return pid
        if how in ('forkserver', 'spawn'):
            child = multiprocessing.get_context(how).Process(
                target=_spawned, args=(self.config_file, control))
        else:
            child = multiprocessing.get_context('fork').Process(
                target=self.be_child, args=(control,))
        if how == 'thread':
            _in_threads(1, lambda index: child.start())
        else:
            child.start()
        if how == 'forkserver':
            self.served[child.pid] = child
        return child.pid

    def open_and_fork(self, how, control, pause):
        """Fork soon after the Notifier was made, which is still at it."""
        self.open()
        end = time.perf_counter() + pause
        while time.perf_counter() < end:
            os.sched_yield()
        return self.fork(how, control)

    def fork_without_hooks(self, keep_lock=True):
        """Fork as programs in C do; the child keeps all and does nothing.

        :returns: the pid of the child
        """
        pid = ctypes.PyDLL(None).fork()     # which keeps the GIL
        if not pid:
            for name in [] if keep_lock else os.listdir('/proc/self/fd'):
                with contextlib.suppress(OSError):
                    if os.readlink('/proc/self/fd/' + name).endswith('.lock'):
                        os.close(int(name))
            while True:
                signal.pause()
        return pid

    def be_child(self, control):
        """Act on commands that come by a Unix socket."""
        self.in_child = True
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(control)
            with sock.makefile('rw') as stream:
                self.serve(stream, stream)
        if self.end:
            self.end()

    def be_master(self, workers, control):
        """Be cotyledon's master from now on; there is no answer."""
        import cotyledon_workers
        self.end = lambda: cotyledon_workers.run_master(
            self, workers, control)

    def pid(self):
        """As the process itself has it."""
        return os.getpid()

    def reap(self, pid):
        """Wait for a child of ours, or of the fork server.

        :returns: its exit status
        """
        if pid in self.served:
            child = self.served.pop(pid)
            child.join()
            return child.exitcode
        return os.waitpid(pid, 0)[1]

    def emit_at_exit(self, count):
        """Emit when the process exits, before the driver's handler runs."""
        atexit.register(lambda: self._emit(0, range(count)))

    def leave(self, how='return', count=0, size=0):
        """Emit some, and end the process at once; there is no answer.

        :param how: return, exit (sys.exit), raise, _exit (os._exit) or kill
        """
        self._emit(0, range(count), size)
        self.end = {'return': sys.exit if self.in_child else bool,
                    'exit': sys.exit,
                    'raise': _raise,
                    '_exit': lambda: os._exit(0),
                    'kill': lambda: signal.raise_signal(signal.SIGKILL)}[how]


def _real_path(argument):
    # The last of /proc/self/fd/N is no name, so it need not be any's.
    return os.path.realpath(argument) if isinstance(argument, str) else None


def _raise():
    raise RuntimeError('told to raise')


def _spawned(config_file, control):
    set_up_logging()
    Service(config_file).be_child(control)


def _in_threads(count, function):
    threads = [threading.Thread(target=function, args=(index,))
               for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


_exit_begun = []


def _exit_begins():
    _exit_begun.append(time.perf_counter())


def _exit_ends():
    """Tell how long the exit handlers took, the driver's among them."""
    if _exit_begun:
        sys.stderr.write('exit handlers of %d took %.3f s\n' % (
            os.getpid(), time.perf_counter() - _exit_begun[-1]))


def set_up_logging(**kwargs):
    """To stderr, unless told otherwise."""
    logging.basicConfig(level=logging.INFO, **(kwargs or dict(
        stream=sys.stderr)), format='%(levelname)s %(name)s %(message)s')


def main(service_class=Service):
    # First, so that it runs last.
    atexit.register(_exit_ends)
    parser = argparse.ArgumentParser()
    parser.add_argument('config_file')
    parser.add_argument('--uid', type=int)
    parser.add_argument('--umask', type=lambda text: int(text, 8))
    arguments = parser.parse_args()
    set_up_logging()
    # Answers alone go to what was stdout.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    service = service_class(arguments.config_file)
    if arguments.umask is not None:
        os.umask(arguments.umask)
    if arguments.uid is not None:
        # While all is readable, so that the user needs no right to read it.
        extension.ExtensionManager('oslo.messaging.notify.drivers')
        os.setgroups([])
        os.setresgid(arguments.uid, arguments.uid, arguments.uid)
        os.setresuid(arguments.uid, arguments.uid, arguments.uid)
    service.serve(sys.stdin, answers)
    if service.end:
        service.end()


if __name__ == '__main__':
    main()
