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
What a notification costs, beside yardsticks that run at the same time.

It is no test: a target that is missed is printed as missed, and the exit
status is 0. How it measures:

* The messages are the real ones of ``notifications.ndjson``, about 1 KB each.
  What is timed is the driver's ``notify()``, in which drivers differ. The
  yardsticks are the log driver with a NullHandler, as it is and less its
  masking, and ``json.dumps()`` alone.
* A *burst* is BURST calls back to back (2.2 MB, which fits in the buffer),
  after which every subscriber is drained before the next begins. Its cost is
  the mean of a call on the clock of the caller: it includes what the driver's
  thread takes from the caller meanwhile.
* One publisher process holds everything that is compared, each with a socket
  and subscribers of its own, and does one burst of each in turn. Ratios are
  taken within such a round, so that the drift of a shared machine cancels.
  Printed are the median of the rounds, the lowest and the highest. On a
  machine that is busy with other things even ratios mean little.
* The subscribers of a socket share one process, which reads and counts. A
  hundred Python processes on a few cores would measure the scheduler.

A new system is a class as those in SYSTEMS, a new point is a generator of
rows as those in POINTS.
"""

import argparse
import collections
import contextlib
import functools
import glob
import itertools
import json
import logging
import multiprocessing
import os
import platform
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
import types

from oslo_config import cfg
import oslo_messaging
from oslo_messaging.notify import _impl_log

import peers
import unix_notifier

BURST = 2000            # calls
LAG = 200000            # calls while a subscriber does not read
RATE = 5000             # of them a second, with a healthy one beside it
IDLE = 10               # seconds
PACE = 500              # calls a second, whose way is timed
WORKERS = 8             # processes that share a path
PATIENCE = 5            # seconds without progress, after which it is lost
MIB = 1024 * 1024
BUFFER = 8 * MIB

_CONTEXT = multiprocessing.get_context('spawn')


def messages():
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)),
                        'notifications.ndjson')
    with open(path, encoding='ascii') as lines:
        return [json.loads(line) for line in lines]


def cycle(items, count):
    return itertools.islice(itertools.cycle(items), count)


# -- systems: what is measured ----------------------------------------------

class Json:
    """Encoding alone, which nobody can do without."""

    def publisher(self, path):
        """What the publisher calls, with ``arguments()``."""
        return json.dumps

    def arguments(self, message):
        return message,


class Log:
    """The log driver, which masks and encodes, then logs into the void."""

    def publisher(self, path):
        logger = logging.getLogger(_impl_log.LogDriver.LOGGER_BASE)
        logger.handlers[:] = [logging.NullHandler()]
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        return _impl_log.LogDriver(None, [], None).notify

    def arguments(self, message):
        return {}, message, message['priority'], None


class LogUnmasked(Log):
    """The log driver less its masking."""

    def publisher(self, path):
        notify = super().publisher(path)
        unmasked = types.SimpleNamespace(mask_dict_password=lambda each: each)
        return functools.partial(types.FunctionType(
            notify.__func__.__code__,
            dict(vars(_impl_log), strutils=unmasked)), notify.__self__)


class Unix(Log):
    """The driver of this project."""

    buffer = BUFFER

    def publisher(self, path):
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        unix_notifier.register_opts(conf)
        for name, value in (('sock_path', path),
                            ('sock_buffer_size', self.buffer),
                            ('sock_max_subscribers', 100)):
            conf.set_override(name, value, 'oslo_messaging_notifications')
        return unix_notifier.UnixDriver(conf).notify

    def subscriber(self, path):
        """A connection, once the publisher's thread listens."""
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = socket.socket(socket.AF_UNIX)
            if not sock.connect_ex(path):
                return sock
            sock.close()
            if time.monotonic() > deadline:
                raise TimeoutError(path)
            time.sleep(0.01)


class Follower(Unix):
    """The same, in a process that does not serve the path itself."""


class Lossless(Unix):
    """The same, with a buffer that holds all there will be."""

    buffer = 32 * BUFFER


SYSTEMS = {'lossless': Lossless(), 'json': Json(), 'log': Log(),
           'log unmasked': LogUnmasked(),
           'unix': Unix(), 'follower': Follower()}


# -- processes --------------------------------------------------------------

class Remote:
    """An object in a process of its own, whose methods are called here."""

    def __init__(self, cls):
        self._pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(cls, theirs))
        self.process.start()
        theirs.close()      # so that its end is noticed

    def __getattr__(self, name):
        def call(*arguments):
            self.begin(name, *arguments)
            return self.end()
        return call

    def begin(self, name, *arguments):
        self._pipe.send((name, arguments))

    def end(self):
        """The result of what was begun."""
        return self._pipe.recv()

    def close(self):
        self._pipe.close()      # twice does no harm
        self.process.join()


def _serve(cls, pipe):
    served = cls()
    with contextlib.suppress(EOFError):
        while True:
            name, arguments = pipe.recv()
            pipe.send(getattr(served, name)(*arguments))


class Publisher:
    """Calls, and times its calls."""

    def __init__(self):
        self._calls = {}
        # What the driver logs would get among our output.
        logging.getLogger().addHandler(logging.NullHandler())

    def open(self, label, system, path):
        system = SYSTEMS[system]
        self._calls[label] = (system.publisher(path), list(
            map(system.arguments, messages())))

    def burst(self, label, count):
        """Seconds that a call takes, back to back."""
        call, arguments = self._calls[label]
        start = time.perf_counter()
        for each in cycle(arguments, count):
            call(*each)
        return (time.perf_counter() - start) / count

    def paced(self, label, count, rate):
        """Call so many times a second."""
        call, arguments = self._calls[label]
        start = time.monotonic()
        for number, each in enumerate(cycle(arguments, count)):
            delay = start + number / rate - time.monotonic()
            if delay > 0:
                time.sleep(delay)
            call(*each)

    def stamped(self, label, count):
        """Call PACE times a second, and say when in the message."""
        call, arguments = self._calls[label]
        for ctxt, message, priority, retry in cycle(arguments, count):
            time.sleep(1 / PACE)
            call(ctxt, dict(message, timestamp=repr(time.monotonic())),
                 priority, retry)

    def memory(self):
        """Bytes of memory; the peak counts from here on."""
        with open('/proc/self/clear_refs', 'w') as control:
            control.write('5')
        return self.peak()      # for now they are the same

    def peak(self):
        with open('/proc/self/status') as status:
            fields = dict(line.split(':', 1) for line in status)
        return int(fields['VmHWM'].split()[0]) * 1024


class Subscribers:
    """Any number of connections to one path, and what each received."""

    def open(self, system, path, count, reads):
        self._socks = [SYSTEMS[system].subscriber(path)
                       for _ in range(count)]
        self._received = [0] * count
        self._first = self._last = None
        if reads:
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        buffer, selector = bytearray(MIB), selectors.DefaultSelector()
        for number, sock in enumerate(self._socks):
            selector.register(sock, selectors.EVENT_READ, number)
        while selector.get_map():
            for key, _mask in selector.select():
                size = key.fileobj.recv_into(buffer)
                self._received[key.data] += size
                self._last = time.monotonic()
                self._first = self._first or self._last
                if not size:
                    selector.unregister(key.fileobj)

    def lack(self, total):
        """Wait until each received so many bytes; how many one lacks."""
        before, since = None, time.monotonic()
        while min(self._received) < total:
            if sum(self._received) != before:
                before, since = sum(self._received), time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                break
            time.sleep(0.002)
        return total - min(self._received)

    def rate(self):
        """Bytes a second that came, from the first to the last."""
        return self._received[0] / (self._last - self._first)

    def delays(self, count):
        """Seconds since they were called, of lines that come stamped."""
        delays = []
        for line in self._socks[0].makefile('rb'):
            now = time.monotonic()
            delays.append(now - float(json.loads(line)['timestamp']))
            if len(delays) == count:
                return delays


class Bench(contextlib.ExitStack):
    """Makes processes and paths, all gone when it is left."""

    def __init__(self, rounds):
        super().__init__()
        self._rounds = rounds
        self._directory = self.enter_context(tempfile.TemporaryDirectory())
        self._numbers = itertools.count()
        self._sizes = [len(json.dumps(each)) + 1 for each in messages()]

    def path(self):
        return os.path.join(self._directory, str(next(self._numbers)))

    def apart(self):
        """Another, whose processes are gone sooner."""
        return Bench(self._rounds)

    @staticmethod
    def progress(text):
        progress(text)

    def remote(self, cls):
        return self.enter_context(contextlib.closing(Remote(cls)))

    def publish(self, system, path):
        """A publisher that is warm."""
        publisher = self.remote(Publisher)
        publisher.open(system, system, path)
        publisher.burst(system, 100)
        return publisher

    def lead(self, system, path):
        """For a follower, have another process serve the path."""
        if system == 'follower':
            self.publish('unix', path)
            SYSTEMS['unix'].subscriber(path).close()

    def subscribe(self, system, path, count=1, reads=True):
        subscribers = self.remote(Subscribers)
        subscribers.open(system, path, count, reads)
        return subscribers

    def size(self, calls):
        """Bytes that a subscriber receives for so many calls."""
        return sum(cycle(self._sizes, calls))

    def compare(self, cases):
        """Microseconds that a call takes in each case, in each round.

        :param cases: by label, a system and a number of subscribers
        """
        publisher, subscribers = self.remote(Publisher), {}
        for label, (system, count) in cases.items():
            path = self.path()
            self.lead(system, path)
            publisher.open(label, system, path)
            if count:
                subscribers[label] = self.subscribe(system, path, count)
        costs = collections.defaultdict(list)
        for number in range(1 + self._rounds):
            progress('round %d of %d' % (number, self._rounds))
            for label in cases:
                costs[label].append(publisher.burst(label, BURST) * 1e6)
                if label in subscribers and subscribers[label].lack(
                        self.size(BURST) * (number + 1)):
                    raise RuntimeError('%s: not all was received' % label)
        return {label: each[1:] for label, each in costs.items()}  # the warm


# -- points -----------------------------------------------------------------

Row = collections.namedtuple('Row', 'what values unit limit')


def rows(costs, limits):
    """The costs, and their ratios to others with the target, if any."""
    for label, values in costs.items():
        yield Row(label, values, 'us', None)
    for (label, base), limit in limits.items():
        yield Row('%s / %s' % (label, base), [
            one / other for one, other in zip(costs[label], costs[base])],
            '', limit)


YARDSTICKS = {'json': ('json', 0), 'log': ('log', 0),
              'log unmasked': ('log unmasked', 0)}


def nobody(bench):
    """One call with nobody connected."""
    costs = bench.compare(dict(YARDSTICKS, nobody=('unix', 0)))
    return rows(costs, {('nobody', 'log'): 0.01,
                        ('nobody', 'log unmasked'): None})


def one(bench):
    """A burst with one subscriber."""
    costs = bench.compare(dict(YARDSTICKS, one=('unix', 1)))
    return rows(costs, {('one', 'log'): 0.15,
                        ('one', 'log unmasked'): None,
                        ('one', 'json'): 1.5})


def hundred(bench):
    """A burst with a hundred subscribers."""
    costs = bench.compare({'one': ('unix', 1), 'hundred': ('unix', 100)})
    return rows(costs, {('hundred', 'one'): 1.3})


def stopped(bench):
    """A subscriber that never reads, with a healthy one beside it."""
    path = bench.path()
    publisher = bench.publish('unix', path)
    healthy = bench.subscribe('unix', path)
    before = publisher.memory()
    bench.subscribe('unix', path, reads=False)
    progress('%d calls at %d/s' % (LAG, RATE))
    publisher.paced('unix', LAG, RATE)
    yield growth('at %d/s' % RATE, before, publisher)
    yield Row('healthy one lacks', [healthy.lack(bench.size(LAG))], 'bytes',
              0)


def flat_out(bench):
    """A subscriber that never reads, and a publisher that never rests."""
    path = bench.path()
    publisher = bench.publish('unix', path)
    before = publisher.memory()
    bench.subscribe('unix', path, reads=False)
    progress('%d calls' % LAG)
    publisher.burst('unix', LAG)
    yield growth('flat out', before, publisher)


def growth(what, before, publisher):
    return Row('memory grows, ' + what, [(publisher.peak() - before) / MIB],
               'MiB', BUFFER // MIB + 4)


def idle(bench):
    """Nothing to do, with one subscriber."""
    path = bench.path()
    publisher = bench.publish('unix', path)
    bench.subscribe('unix', path)
    publisher.burst('unix', 100)
    time.sleep(2)
    before = switches(publisher.process.pid)
    progress('%d seconds' % IDLE)
    time.sleep(IDLE)
    yield Row('context switches in %d s' % IDLE,
              [switches(publisher.process.pid) - before], '', 0)


def switches(pid):
    """Context switches of all threads of a process so far."""
    count = 0
    for path in glob.glob('/proc/%d/task/*/status' % pid):
        with open(path) as status:
            count += sum(int(line.split()[1]) for line in status
                         if 'ctxt_switches' in line)
    return count


def follower(bench):
    """A call in a process that does not serve the path itself."""
    for count, limit in ((0, 1.5), (1, 1.3)):
        labels = 'leader, %d' % count, 'follower, %d' % count
        costs = bench.compare(dict(zip(labels, (('unix', count),
                                                ('follower', count)))))
        yield from rows(costs, {labels[::-1]: limit})


def latency(bench):
    """From call to subscriber, paced; medians of the rounds."""
    pairs, costs = {}, collections.defaultdict(list)
    for system in ('unix', 'follower'):
        path = bench.path()
        bench.lead(system, path)
        pairs[system] = (bench.publish(system, path),
                         bench.subscribe(system, path, reads=False))
    for number in range(6):
        progress('round %d of 5' % number)
        for system, (publisher, subscriber) in pairs.items():
            subscriber.begin('delays', PACE)
            publisher.stamped(system, PACE)
            costs[system].append(
                statistics.median(subscriber.end()) * 1e6)
    return rows({label: each[1:] for label, each in costs.items()},
                {('follower', 'unix'): 2.5})


def workers(bench):
    """All processes flat out into one subscriber, against one alone."""
    costs = collections.defaultdict(list)
    for number in range(5):
        progress('round %d of 5' % (number + 1))
        for count in (1, WORKERS):
            path = bench.path()
            publishers = [bench.publish('lossless', path)
                          for _ in range(count)]
            subscriber = bench.subscribe('lossless', path)
            for each in publishers:
                each.begin('burst', 'lossless', 10 * BURST // count)
            for each in publishers:
                each.end()
            if subscriber.lack(bench.size(10 * BURST // count) * count):
                raise RuntimeError('not all was received')
            costs['%d' % count].append(subscriber.rate() / MIB)
            for each in (*publishers, subscriber):
                each.close()
    yield from (Row('%s publishing' % label, values, 'MiB/s', None)
                for label, values in costs.items())
    yield Row('1 / %d' % WORKERS, [
        one / all_ for one, all_ in zip(*costs.values())], '', 1)


class Source:
    """Sends the same bytes to whoever connects, as fast as they are read."""

    def open(self, path, count):
        self._data = b''.join(json.dumps(each).encode() + b'\n'
                              for each in cycle(messages(), count))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            sock = self._listener.accept()[0]
            with contextlib.suppress(OSError):
                sock.sendall(self._data)
                sock.shutdown(socket.SHUT_WR)


class Consumer:
    """Reads, and times how long it takes."""

    def json(self, _path, count):
        lines = [json.dumps(each).encode()
                 for each in cycle(messages(), count)]
        begin = time.perf_counter()
        for line in lines:
            json.loads(line)
        return time.perf_counter() - begin

    def subscribe(self, path, count):
        begin = time.perf_counter()
        found = sum(1 for _ in unix_notifier.subscribe(path, reconnect=False))
        assert found == count, found
        return time.perf_counter() - begin

    def unix(self, path, count):
        """A listener by URL; the bytes are there when it starts."""
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        driver = unix_notifier.UnixTransportDriver(
            conf, oslo_messaging.TransportURL.parse(conf, 'unix://' + path))
        return self._listen(
            oslo_messaging.transport.NotificationTransport(driver), count)

    def fake(self, _path, count):
        """The same listener; the messages are in memory when it starts."""
        conf = cfg.ConfigOpts()
        conf([], default_config_files=[])
        transport = oslo_messaging.get_notification_transport(conf, 'fake://')
        target = oslo_messaging.Target(topic='notifications.info')
        for each in cycle(messages(), count):
            transport._send_notification(
                target, {}, dict(each, priority='INFO'), 2.0, 0)
        return self._listen(transport, count)

    @staticmethod
    def _listen(transport, count):
        left, done = itertools.count(count - 1, -1), threading.Event()

        def handle(*_arguments):
            if not next(left):
                done.set()

        server = oslo_messaging.get_notification_listener(
            transport, [oslo_messaging.Target(topic='notifications')],
            [types.SimpleNamespace(info=handle, error=handle)], 'threading')
        begin = time.perf_counter()
        server.start()
        assert done.wait(PATIENCE * 10)
        seconds = time.perf_counter() - begin
        server.stop()
        server.wait()
        return seconds


def consumers(bench):
    """A message at a subscriber of ours, as against what it must cost."""
    source, consumer = bench.remote(Source), bench.remote(Consumer)
    path, count = bench.path(), 5 * BURST
    source.open(path, count)
    costs = collections.defaultdict(list)
    for number in range(6):
        progress('round %d of 5' % number)
        for label in ('json', 'subscribe', 'fake', 'unix'):
            seconds = getattr(consumer, label)(path, count)
            costs[label].append(seconds / count * 1e6)
    return rows({label: each[1:] for label, each in costs.items()},
                {('subscribe', 'json'): 1.25, ('unix', 'fake'): 1.25})


POINTS = {each.__name__: each
          for each in (nobody, one, hundred, stopped, flat_out, idle,
                       follower, latency, workers, consumers,
                       *peers.POINTS)}


# -- output -----------------------------------------------------------------

def progress(text):
    print('  %-40s' % text, end='\r', file=sys.stderr, flush=True)


def finish(point, row):
    """A row as it is printed, with median and verdict."""
    middle = statistics.median(row.values)
    verdict = None if row.limit is None else (
        'met' if middle <= row.limit else 'missed')
    return dict(row._asdict(), point=point, median=middle, verdict=verdict)


def table(rows):
    line = '%-10s  %-25s  %-24s  %-17s  %-8s  %s'
    yield line % ('point', 'what', 'median', 'lowest - highest', 'target',
                  'verdict')
    for row in rows:
        values, limit = row['values'], row['limit']
        yield line % (
            row['point'], row['what'],
            '%.4g %s' % (row['median'], row['unit']), '' if len(values) == 1
            else '%.4g - %.4g' % (min(values), max(values)),
            '' if limit is None else '<= %g' % limit, row['verdict'] or '')


def measure(names, rounds):
    for name in names:
        print('%s: %s' % (name, POINTS[name].__doc__), file=sys.stderr)
        with Bench(rounds) as bench:
            for row in POINTS[name](bench):
                yield finish(name, Row(*row))
        progress('')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0])
    parser.add_argument('--only', metavar='POINT', nargs='+', choices=POINTS,
                        help='any of: ' + ', '.join(POINTS))
    parser.add_argument('--rounds', type=int, default=15,
                        help='of bursts; the default is %(default)s')
    parser.add_argument('--json', action='store_true',
                        help='print one JSON object for each row')
    parser.add_argument('--chart', metavar='FILE',
                        help='draw the comparison with peers, as SVG')
    parser.add_argument('--rabbit', metavar='URL', help='compare with '
                        'RabbitMQ, too: rabbit://user:password@host:port/')
    arguments = parser.parse_args()
    if arguments.rabbit:
        os.environ[peers.RABBIT] = arguments.rabbit
    done = []
    for row in measure(arguments.only or POINTS, arguments.rounds):
        done.append(row)
        if arguments.json:
            print(json.dumps(row), flush=True)
    machine = 'Python %s, %d cores, Linux %s; load %.1f' % (
        platform.python_version(), os.cpu_count(), platform.release(),
        os.getloadavg()[0])
    if arguments.chart:
        peers.chart(arguments.chart, done, machine)
    if not arguments.json:
        print(machine)
        print('\n'.join(table(done)))


if __name__ == '__main__':
    main()
