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


"""The driver beside its peers: what a call, the way and the readers cost.

Each system is given the same real notifications by one publisher, in a
process, as a competent user would have it: ``notify()`` of the driver, or
``json.dumps()`` and one send. Its subscribers share another process, which
waits for all of them at once and only counts, or takes time stamps; a hundred
processes on a few cores would measure the scheduler. The floor, with
``sendall()`` to each subscriber, has none of anybody's features.

ZeroMQ's and nng's queues are made as long as they can be, and the driver's
buffer large, where nothing may be lost.
"""

import collections
import contextlib
import importlib.util
import itertools
import json
import logging
import logging.handlers
import os
import selectors
import signal
import socket
import time
import types

from oslo_config import cfg
import oslo_messaging
from oslo_messaging.notify import _impl_log
from oslo_messaging.notify import messaging

import unix_notifier

MIB = 1024 * 1024
PATIENCE = 10           # seconds without any progress
GROUP = 'oslo_messaging_notifications'


def retry(function, *arguments):
    """Until the other side is there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return function(*arguments)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


# -- systems ----------------------------------------------------------------

# recv(MIB) would take 13 us, mostly to allocate, where this takes 2.
_buffer = memoryview(bytearray(MIB))


def take_in(sock):
    """What there is; raises EOFError at the end of the stream."""
    size = sock.recv_into(_buffer)
    if not size:
        raise EOFError
    return bytes(_buffer[:size])


class Stream:
    """Whoever reads lines from a stream socket."""

    def publisher(self, path, count, large):
        """What publishes a notification, to so many subscribers.

        :param large: whether all of a burst has to be kept
        """
        raise NotImplementedError

    def subscriber(self, path, number):
        """A socket; it is connected, and will be sent what is published."""
        sock = socket.socket(socket.AF_UNIX)
        retry(sock.connect, path)
        return sock

    def receive(self, sock, parts):
        """What there is: a number of messages, and the last of them.

        :param parts: a list of this subscriber's own, for what is not whole
        """
        data = take_in(sock)
        count = data.count(b'\n')
        if not count:
            parts.append(data)
            return 0, None
        whole, _, rest = data.rpartition(b'\n')
        before, newline, last = whole.rpartition(b'\n')
        if not newline:
            last = b''.join(parts) + last
        parts[:] = [rest]
        return count, last


class Unix(Stream):
    """The driver, which leads."""

    def publisher(self, path, count, large):
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        unix_notifier.register_opts(conf)
        for name, value in (('sock_path', path),
                            ('sock_max_subscribers', 200)):
            conf.set_override(name, value, GROUP)
        if large:
            conf.set_override('sock_buffer_size', 256 * MIB, GROUP)
        notify = unix_notifier.UnixDriver(conf).notify
        return lambda message: notify({}, message, 'INFO', None)


class Follower(Unix):
    """The driver, which follows another process."""


class Log(Stream):
    """The log driver, into the void."""

    def publisher(self, path, count, large):
        self._log(logging.NullHandler())
        driver = _impl_log.LogDriver(None, [], None)
        return lambda message: driver.notify({}, message, 'INFO', None)

    @staticmethod
    def _log(*handlers):
        logger = logging.getLogger(_impl_log.LogDriver.LOGGER_BASE)
        logger.handlers[:] = handlers
        logger.setLevel(logging.INFO)
        logger.propagate = False

    def subscriber(self, path, number):
        return None


class LogSocket(Log):
    """The log driver and SocketHandler: subscribers listen, pickles come."""

    def publisher(self, path, count, large):
        publish = super().publisher(path, count, large)
        handlers = [logging.handlers.SocketHandler(
            '%s.%d' % (path, number), None) for number in range(count)]
        for handler in handlers:
            handler.sock = retry(handler.makeSocket)
        self._log(*handlers)
        return publish

    def subscriber(self, path, number):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind('%s.%d' % (path, number))
        listener.listen()
        return listener.accept()[0]

    def receive(self, sock, parts):
        """Each pickle has four bytes of its length before it."""
        data, count, last, at = b''.join((*parts, take_in(sock))), 0, None, 0
        while len(data) - at >= 4:
            end = at + 4 + int.from_bytes(data[at:at + 4], 'big')
            if end > len(data):
                break
            count, last, at = count + 1, data[at + 4:end], end
        parts[:] = [data[at:]]
        return count, last


class Floor(Stream):
    """json.dumps() and sendall(): no thread, no bound, no features."""

    def publisher(self, path, count, large):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(200)
        socks = []

        def publish(message):
            if len(socks) < count:
                socks.extend(listener.accept()[0] for _ in range(count))
            line = json.dumps(message).encode() + b'\n'
            for sock in socks:
                sock.sendall(line)

        return publish


class Zmq(Stream):
    """ZeroMQ, PUB and SUB over ipc."""

    needs = 'zmq'

    def publisher(self, path, count, large):
        zmq = importlib.import_module('zmq')
        sock = zmq.Context.instance().socket(zmq.PUB)
        sock.sndhwm = 0 if large else 1000
        sock.bind('ipc://' + path)
        return lambda message: sock.send(json.dumps(message).encode())

    def subscriber(self, path, number):
        zmq = importlib.import_module('zmq')
        sock = zmq.Context.instance().socket(zmq.SUB)
        sock.rcvhwm = 0
        sock.subscribe(b'')
        sock.connect('ipc://' + path)
        return sock

    def receive(self, sock, parts):
        """Its descriptor reports changes only, hence to the end."""
        zmq = importlib.import_module('zmq')
        count, last = 0, None
        with contextlib.suppress(zmq.Again):
            while True:
                last = sock.recv(zmq.NOBLOCK)
                count += 1
        return count, last


class Nng(Stream):
    """nng, pub0 and sub0 over ipc."""

    needs = 'pynng'
    longest = 8192      # messages, the most that it takes as a length

    def publisher(self, path, count, large):
        pynng = importlib.import_module('pynng')
        sock = pynng.Pub0(listen='ipc://' + path,
                          send_buffer_size=self.longest)
        return lambda message: sock.send(json.dumps(message).encode())

    def subscriber(self, path, number):
        pynng = importlib.import_module('pynng')
        sock = pynng.Sub0(recv_buffer_size=self.longest)
        sock.subscribe(b'')
        retry(os.stat, path)
        sock.dial('ipc://' + path, block=True)
        sock.fileno = lambda: sock.recv_fd
        return sock

    def receive(self, sock, parts):
        pynng = importlib.import_module('pynng')
        count, last = 0, None
        with contextlib.suppress(pynng.TryAgain):
            while True:
                last = sock.recv(block=False)
                count += 1
        return count, last


class Rabbit:
    """RabbitMQ and the driver messagingv2, where a URL is given."""

    def _key(self, path):
        return path.replace('/', '-')

    def publisher(self, path, count, large):
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        transport = oslo_messaging.get_notification_transport(
            conf, url=os.environ[RABBIT])
        notify = messaging.MessagingV2Driver(
            conf, topics=[self._key(path)], transport=transport).notify
        return lambda message: notify({}, message, 'info', None)

    def subscriber(self, path, number):
        """A queue of its own, so that all get everything."""
        kombu = importlib.import_module('kombu')
        connection = kombu.Connection(
            os.environ[RABBIT].replace('rabbit', 'amqp', 1))
        queue = kombu.Queue(
            '', kombu.Exchange('openstack', 'topic', durable=False),
            self._key(path) + '.info', exclusive=True, durable=False)
        bodies = []
        consumer = kombu.Consumer(
            connection.channel(), [queue], no_ack=True,
            on_message=lambda message: bodies.append(message.body))
        consumer.consume()
        return types.SimpleNamespace(
            connection=connection, bodies=bodies, consumer=consumer,
            fileno=connection.connection.sock.fileno)

    def receive(self, sock, parts):
        with contextlib.suppress(TimeoutError):
            while True:
                sock.connection.drain_events(timeout=0)
        count, last = len(sock.bodies), None
        if count:
            last = sock.bodies[-1]
            last = last.encode() if isinstance(last, str) else bytes(last)
        sock.bodies.clear()
        return count, last


# The environment variable that has the URL of RabbitMQ, for all processes.
RABBIT = 'BENCHMARK_RABBIT_URL'
# How many subscribers it can be asked to serve in reasonable time.
RABBIT_MOST = 10

SYSTEMS = {'rabbit': Rabbit, 'floor': Floor, 'unix': Unix,
           'follower': Follower, 'log': Log,
           'log+socket': LogSocket, 'zmq': Zmq, 'nng': Nng}
BROADCAST = ('floor', 'unix', 'follower', 'log+socket', 'zmq', 'nng',
             'rabbit')


# -- processes --------------------------------------------------------------

class Publisher:
    """Publishes, and times its calls."""

    def open(self, system, path, count, large=False):
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)),
                               'notifications.ndjson')) as lines:
            self._messages = itertools.cycle(
                [json.loads(line) for line in lines])
        self._publish = SYSTEMS[system]().publisher(path, count, large)

    def _call(self):
        """Publish one, with a time stamp; seconds that the call took."""
        message = dict(next(self._messages), timestamp='=%020d' %
                       time.monotonic_ns())
        begin = time.perf_counter()
        self._publish(message)
        return time.perf_counter() - begin

    def burst(self, count):
        """Seconds for a call, on average, flat out."""
        return sum(self._call() for _ in range(count)) / count

    def paced(self, count, rate):
        """Seconds for each call, at a rate."""
        costs, due = [], time.perf_counter()
        for _ in range(count):
            due += 1 / rate
            while (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            costs.append(self._call())
        return costs

    def memory(self):
        """Bytes that are resident."""
        with open('/proc/self/statm') as statm:
            return int(statm.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    def switches(self):
        """How often threads went to sleep, but for this one."""
        total = 0
        for task in os.listdir('/proc/self/task'):
            if int(task) != os.getpid():
                with open('/proc/self/task/%s/status' % task) as status:
                    total += int(status.read().partition(
                        '\nvoluntary_ctxt_switches:')[2].split()[0])
        return total


class Subscribers:
    """Some subscribers of one path."""

    def open(self, system, path, count):
        self._system = SYSTEMS[system]()
        self._path = path
        self._selector = selectors.DefaultSelector()
        self._socks = []
        for number in range(count):
            self._add(self._system.subscriber(path, number))

    def _add(self, sock):
        self._socks.append(sock)
        if sock is not None:
            self._selector.register(sock, selectors.EVENT_READ, [])

    def _receive(self, timeout):
        """Whoever has something: how much, and the last of it."""
        for key, _ in self._selector.select(timeout):
            with contextlib.suppress(EOFError, BlockingIOError):
                count, last = self._system.receive(key.fileobj, key.data)
                yield count, last

    def take(self, count, patience=PATIENCE):
        """Read so many in all; when the last came, and how many did."""
        got, last = 0, time.monotonic()
        while got < count and time.monotonic() < last + patience:
            now = sum(number for number, _ in self._receive(0.1))
            if now:
                got, last = got + now, time.monotonic()
        return last, got

    def delays(self, count, patience=1):
        """Seconds on the way, of whatever came alone or last."""
        found, got, last = [], 0, time.monotonic()
        while got < count and time.monotonic() < last + patience:
            for number, data in self._receive(0.1):
                last = time.monotonic()
                got += number
                if data is not None:
                    found.append(last - stamp(data))
        return found

    def join(self, times):
        """Seconds after connecting of which nothing was received, worst."""
        gaps = []
        for number in range(times):
            sock = self._system.subscriber(self._path, number)
            begin = time.monotonic()
            parts, data = [], None
            while data is None:
                data = self._first(sock, parts)
            gaps.append(max(0, stamp(data) - begin))
            sock.close()
        return gaps

    @staticmethod
    def _first(sock, parts):
        """What comes first, once it is whole."""
        if not isinstance(sock, socket.socket):
            return sock.recv()
        parts.append(sock.recv(65536))
        data = b''.join(parts)
        return data if b'\n' in data else None


def stamp(data):
    """The first time stamp in it, in seconds."""
    at = data.index(b'=0')
    return int(data[at + 1:at + 21]) / 1e9


# -- points -----------------------------------------------------------------

# Calls in a burst, of which nothing is lost; at so many a second; flat out.
BURST = 2000
PACED, RATE = 500, 1000
MANY = 20000
ROUNDS = 7
COUNTS = 1, 10, 100


def available(name, count=0):
    if name == 'rabbit':
        return RABBIT in os.environ and count <= RABBIT_MOST
    needs = getattr(SYSTEMS[name], 'needs', None)
    return needs is None or importlib.util.find_spec(needs) is not None


def pair(bench, name, count, large=True):
    """A publisher and its subscribers, all of whom are seen to receive."""
    path = bench.path()
    if name == 'follower':
        bench.remote(Publisher).open('unix', path, 0, large)
    publisher, subscribers = bench.remote(Publisher), bench.remote(Subscribers)
    publisher.begin('open', name, path, count, large)
    subscribers.begin('open', name, path, count)
    publisher.end()
    if name == 'floor':
        publisher.burst(1)      # accepts them
    subscribers.end()
    for _ in range(50 if name != 'log' else 0):
        publisher.burst(1)      # ZeroMQ's and nng's come when they come
        if subscribers.take(count, 0.2)[1] >= count:
            break
    return publisher, subscribers


def compare(bench, names, count, measure):
    """What each system costs, in each round, by what was measured.

    All pairs are there at once, and take turns in each round: idle ones cost
    nothing, and ratios within a round are free of the drift of the machine.

    :param measure: yields (what, value) for a publisher and its subscribers
    :returns: a dict of dicts, by what was measured and by system, of values
    """
    costs = collections.defaultdict(lambda: collections.defaultdict(list))
    with bench.apart() as apart:
        pairs = {}
        for name in names:
            if not available(name, count):
                continue
            bench.progress('%s, %d' % (name, count))
            pairs[name] = pair(apart, name, count)
        for number in range(ROUNDS):
            for name, (publisher, subscribers) in pairs.items():
                bench.progress('%s, %d, round %d of %d' % (
                    name, count, number + 1, ROUNDS))
                for what, value in measure(publisher, subscribers):
                    costs[what][name].append(value)
    return costs


def call(bench):
    """One call in a burst, beside peers, by number of subscribers."""
    for count in (0, *COUNTS):
        def measure(publisher, subscribers):
            subscribers.begin('take', BURST * count)
            yield 'us', publisher.burst(BURST) * 1e6
            subscribers.end()

        names = BROADCAST[1:] + ('log',) if not count else BROADCAST
        yield from rows(compare(bench, names, count, measure)['us'], count,
                        'us', 0.5)


def paced(bench):
    """A call, and the way to a subscriber, at 1000 a second."""
    for count in COUNTS:
        def measure(publisher, subscribers):
            subscribers.begin('delays', PACED * count)
            calls = publisher.paced(PACED, RATE)
            for what, found in (('call', calls),
                                ('end to end', subscribers.end())):
                for rank in (50, 99) if found else ():
                    yield ('us, %s p%d' % (what, rank),
                           percentile(found, rank) * 1e6)

        limits = {'us, call p50': 1,
                  'us, end to end p50': {10: 0.8}.get(count, 1)}
        for what, costs in compare(bench, BROADCAST, count, measure).items():
            yield from rows(costs, count, what, limits.get(what))


def percentile(values, rank):
    return sorted(values)[len(values) * rank // 100]


def throughput(bench):
    """Microseconds for a message that reaches all, flat out, none lost."""
    for count in COUNTS:
        many = max(1000, MANY // count)

        def measure(publisher, subscribers):
            subscribers.begin('take', many * count, 2)
            begin = time.monotonic()
            publisher.burst(many)
            last, got = subscribers.end()
            yield '% lost', 100 - 100 * got / many / count
            if got == many * count:
                yield 'us/message', (last - begin) / many * 1e6

        for what, costs in compare(bench, BROADCAST, count, measure).items():
            if what == '% lost':
                yield from (('%s, %d: lost' % (name, count), values, '%', None)
                            for name, values in costs.items() if any(values))
            else:
                yield from rows(costs, count, what, 1 / 1.5)


def stalled(bench):
    """What a healthy one lacks beside one that is stopped; memory."""
    for name in filter(available, ('unix', 'zmq', 'nng')):
        with bench.apart() as apart:
            path = apart.path()
            publisher = apart.remote(Publisher)
            publisher.open(name, path, 2)
            healthy, stopped = (apart.remote(Subscribers) for _ in range(2))
            healthy.open(name, path, 1)
            stopped.open(name, path, 1)
            publisher.paced(300, 1000)
            healthy.take(10 ** 9, 0.5)
            # The process, for libraries read in threads of their own.
            os.kill(stopped.process.pid, signal.SIGSTOP)
            before = publisher.memory()
            healthy.begin('take', MANY, 2)
            publisher.paced(MANY, 5000)
            yield ('%s: lacking' % name, [MANY - healthy.end()[1]], '', None)
            yield ('%s: memory' % name, [
                (publisher.memory() - before) / MIB], 'MiB', None)
            os.kill(stopped.process.pid, signal.SIGCONT)


def join(bench):
    """Milliseconds after connect() of which nothing is received, worst."""
    for name in filter(available, ('unix', 'follower', 'zmq', 'nng')):
        with bench.apart() as apart:
            publisher, subscribers = pair(apart, name, 1)
            publisher.begin('paced', 4000, 2000)
            gaps = subscribers.join(50)
            publisher.end()
            yield ('%s: unseen' % name, [max(gaps) * 1e3], 'ms', None)


def rest(bench):
    """How often a publisher's threads wake up while nothing happens, 5 s."""
    for name in filter(available, ('unix', 'follower', 'zmq', 'nng')):
        with bench.apart() as apart:
            publisher, _ = pair(apart, name, 1)
            time.sleep(0.5)
            before = publisher.switches()
            time.sleep(5)
            yield ('%s: switches' % name, [publisher.switches() - before],
                   '', None)


def rows(costs, count, unit, limit):
    """The costs, and what the driver's are of ZeroMQ's, with the target."""
    for name, values in costs.items():
        yield '%s, %d' % (name, count), values, unit, None
    for name in 'unix', 'follower':
        if name in costs and 'zmq' in costs:
            yield ('%s / zmq, %d' % (name, count), [
                one / other for one, other in zip(costs[name], costs['zmq'])],
                unit.partition(', ')[2], limit if name == 'unix' else None)


POINTS = call, paced, throughput, stalled, join, rest


def chart(path, rows, title):
    """Draw who takes how long: an SVG file, by matplotlib."""
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot
    kinds = [('call', 'us', 'a call in a burst'),
             ('paced', 'us, call p50', 'a call at 1000/s, p50'),
             ('paced', 'us, end to end p50', 'end to end at 1000/s, p50'),
             ('throughput', 'us/message', 'a message flat out, none lost')]
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4), sharey=True)
    for axis, (point, unit, label) in zip(axes, kinds):
        found = {row['what']: row['median'] for row in rows
                 if (row['point'], row['unit']) == (point, unit)}
        for index, name in enumerate(BROADCAST):
            values = [found.get('%s, %d' % (name, count)) or 0
                      for count in COUNTS]
            if not any(values):
                continue
            axis.bar([at + index / 8 for at in range(3)], values, 1 / 8,
                     label=name)
        axis.set(title=label, yscale='log', xlabel='subscribers')
        axis.set_xticks([at + 0.3 for at in range(3)], COUNTS)
    axes[0].set_ylabel('microseconds')
    axes[-1].legend(loc='upper left', bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
