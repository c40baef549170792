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

"""
The driver and its peers, as a competent user would have them.

Each system is a class that says how one process publishes a notification, as
``notify()`` of the driver, or as ``json.dumps()`` and one send, and how
another is its subscribers. Yardsticks have none: the log driver with a
NullHandler, as it is and less its masking, and ``json.dumps()`` alone. The
floor, with ``sendall()`` to each subscriber, has none of anybody's features.

ZeroMQ's and nng's queues are made as long as they can be, and the driver's
buffer large, where nothing may be lost.
"""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import logging.handlers
import os
import selectors
import signal
import socket
import threading
import time
import types

from oslo_config import cfg
import oslo_messaging
from oslo_messaging.notify import _impl_log
from oslo_messaging.notify import messaging

import unix_notifier

MIB = 1024 * 1024
PATIENCE = 10           # seconds without any progress
REST = 0.1              # seconds in which all that is under way arrives
GROUP = 'oslo_messaging_notifications'
# The environment variable that has the URL of RabbitMQ, for all processes.
RABBIT = 'BENCHMARK_RABBIT_URL'
# How many subscribers it can be asked to serve in reasonable time.
RABBIT_MOST = 10
LOST = b'"notifications.lost"'


def messages():
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                        'notifications.ndjson')
    with open(path, encoding='ascii') as lines:
        return [json.loads(line) for line in lines]


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
        count = data.count(b'\n') - data.count(LOST)
        if b'\n' not in data:
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


class Json:
    """Encoding alone, which nobody can do without."""

    def publisher(self, path, count, large):
        return json.dumps


class Log(Stream):
    """The log driver, which masks and encodes, then logs into the void."""

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


class LogUnmasked(Log):
    """The log driver less its masking."""

    def publisher(self, path, count, large):
        super().publisher(path, count, large)
        unmasked = types.SimpleNamespace(mask_dict_password=lambda each: each)
        notify = functools.partial(types.FunctionType(
            _impl_log.LogDriver.notify.__code__,
            dict(vars(_impl_log), strutils=unmasked)),
            _impl_log.LogDriver(None, [], None))
        return lambda message: notify({}, message, 'INFO', None)


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
        sock.rcvtimeo = PATIENCE * 1000
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
        sock = pynng.Sub0(recv_buffer_size=self.longest,
                          recv_timeout=PATIENCE * 1000)
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


SYSTEMS = {'json': Json, 'log': Log, 'log unmasked': LogUnmasked,
           'rabbit': Rabbit, 'floor': Floor, 'unix': Unix,
           'follower': Follower, 'log+socket': LogSocket, 'zmq': Zmq,
           'nng': Nng}
YARDSTICKS = 'json', 'log', 'log unmasked'
OURS = 'unix', 'follower'
# Another build of the driver, and where it is: the first in sys.path of the
# processes that are to have it.
OLD, old_path = 'old ', None
SYSTEMS.update((OLD + name, SYSTEMS[name]) for name in OURS)
ALL_OURS = 'unix', OLD + 'unix', 'follower', OLD + 'follower'
BROADCAST = ('floor', *ALL_OURS, 'log+socket', 'zmq', 'nng', 'rabbit')
chosen = set(SYSTEMS)


def available(name, count=0):
    if name not in chosen or name.startswith(OLD) and old_path is None:
        return False
    if name == 'rabbit':
        return RABBIT in os.environ and count <= RABBIT_MOST
    needs = getattr(SYSTEMS[name], 'needs', None)
    return needs is None or importlib.util.find_spec(needs) is not None


# -- processes --------------------------------------------------------------

class Publisher:
    """Publishes, and times its calls."""

    def open(self, system, path, count, large=False):
        # What the driver logs would get among our output.
        logging.getLogger().addHandler(logging.NullHandler())
        self._messages = itertools.cycle(messages())
        self._publish = SYSTEMS[system]().publisher(path, count, large)

    def burst(self, count):
        """Seconds that a call takes, back to back."""
        publish = self._publish
        begin = time.perf_counter()
        for message in itertools.islice(self._messages, count):
            publish(message)
        return (time.perf_counter() - begin) / count

    def paced(self, count, rate):
        """Seconds for each call, at a rate; a message says when it was."""
        costs, due = [], time.perf_counter()
        for message in itertools.islice(self._messages, count):
            due += 1 / rate
            while (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            stamped = dict(message,
                           timestamp='=%020d' % time.monotonic_ns())
            begin = time.perf_counter()
            self._publish(stamped)
            costs.append(time.perf_counter() - begin)
        return costs

    @staticmethod
    def cpu():
        """Seconds that this process has run so far."""
        return time.process_time()

    def beside_busy(self, count, rate):
        """The same, beside a thread that never rests."""
        done = threading.Event()

        def run():
            while not done.is_set():
                sum(range(100))

        thread = threading.Thread(target=run)
        thread.start()
        costs = self.paced(count, rate)
        done.set()
        thread.join()
        return costs

    def last_act(self, system, path, count, end):
        """Have a child, which was heard and then rests, emit and be gone.

        :returns: how many were received
        """
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            self.open(system, path, 1)
            os.read(reading, 1)
            self.burst(1)
            os.read(reading, 1)
            time.sleep(REST)
            self._end(count, end)
        stream, parts, got = SYSTEMS[system](), [], -1
        with stream.subscriber(path, 0) as sock:
            os.write(writing, b'-')
            sock.settimeout(PATIENCE)
            while got < 0:
                got += stream.receive(sock, parts)[0]
            os.write(writing, b'-')
            os.waitpid(pid, 0)
            sock.settimeout(REST)
            with contextlib.suppress(EOFError, TimeoutError):
                while got < count:
                    got += stream.receive(sock, parts)[0]
        os.close(reading)
        os.close(writing)
        return got

    def _end(self, count, end):
        def act(*_arguments):
            self.burst(count)
            if end == 'SIGKILL':
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)

        if end == 'SIGTERM':    # as nova-compute and cotyledon's workers
            signal.signal(signal.SIGTERM, act)
            os.kill(os.getpid(), signal.SIGTERM)
        act()


class Subscribers:
    """Some subscribers of one path."""

    def open(self, system, path, count):
        self._system = SYSTEMS[system]()
        self._path = path
        self._selector = selectors.DefaultSelector()
        for number in range(count):
            self._selector.register(self._system.subscriber(path, number),
                                    selectors.EVENT_READ, [])

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
        """Read so many; how long what came alone or last took, in seconds.

        :returns: the times, and how many came
        """
        found, got, last = [], 0, time.monotonic()
        while got < count and time.monotonic() < last + patience:
            for number, data in self._receive(0.1):
                last = time.monotonic()
                got += number
                if data is not None:
                    found.append(last - stamp(data))
        return found, got

    def join(self, times):
        """Seconds after connecting of which nothing was received, of each."""
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
        sock.settimeout(PATIENCE)
        parts.append(sock.recv(65536))
        data = b''.join(parts)
        return data if b'\n' in data else None


def stamp(data):
    """The first time stamp in it, in seconds."""
    at = data.index(b'=0')
    return int(data[at + 1:at + 21]) / 1e9
