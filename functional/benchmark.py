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
What a notification costs, beside peers and yardsticks that run with it.

It is no test: a target that is missed is printed as missed, and the exit
status is 0. How it measures:

* The messages are the real ones of ``notifications.ndjson``, about 1 KB each.
  Each system publishes them in a process of its own, as peers.py says.
* A *burst* is calls back to back, after which every subscriber is drained
  before the next begins. Its cost is the mean of a call on the clock of the
  caller: it includes what a thread of the system takes from the caller
  meanwhile. *Paced*, each call is timed alone, and each message on its way.
  *CPU* is what the process of the publisher has run for each, with its threads
  and its pauses: others on the machine disturb that the least.
* All that is compared does its part in turn in each round, while the others
  are idle. Ratios are taken within a round, so that the drift of a shared
  machine cancels; the first round is for warming up. Printed are the median
  of the rounds, the lowest and the highest. On a machine that is busy with
  other things even ratios mean little.
* With ``--against`` an older build does its part as well, in processes that
  find it first, and what this build costs is given as a ratio to that.
* The subscribers of a publisher share one process, which waits for all of
  them at once and only counts, or looks at time stamps. A hundred Python
  processes on a few cores would measure the scheduler.

A new system is a class as those in peers.py, a new point is a generator of
rows as those in POINTS.
"""

import argparse
import collections
import contextlib
import functools
import glob
import itertools
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types

from oslo_config import cfg
import oslo_messaging

import base
import peers
import unix_notifier

COUNTS = 1, 10, 100     # subscribers
BURST, BURSTS = 2000, 5     # calls, of which nothing is lost; in a round
PACED, RATE = 500, 1000     # calls, at so many a second
BUSY, BUSY_RATE = 200, 50   # the same, beside a busy thread
MANY, FLATS = 20000, 2  # calls flat out; in a round
LAG = 200000            # calls while a subscriber does not read
JOINS, JOINED = 200, (6000, 2000)   # while so many come, at so many a second
IDLE = 10               # seconds
# How a process is gone, after how many calls, and how often that is tried.
ENDS, LAST, ACTS = ('os._exit', 'SIGKILL', 'SIGTERM'), (1, 5, 20), 50
WORKERS = 8             # processes that share a path
CREW, HAND_ONS = 4, 20  # the same, of which the leader leaves; in a round
BUFFER = 8 * peers.MIB
# What subscribers may come to at any time, and what does not wait for one that
# stops to read, as the floor and a SocketHandler do for ever.
QUEUES = *peers.ALL_OURS, 'zmq', 'nng'

_CONTEXT = multiprocessing.get_context('spawn')


# -- processes --------------------------------------------------------------

class Remote:
    """An object in a process of its own, whose methods are called here."""

    def __init__(self, cls, path=()):
        """Start it.

        :param path: what comes first in its sys.path
        """
        self._pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(cls, theirs))
        sys.path[:0] = path     # which is passed on
        self.process.start()
        del sys.path[:len(path)]
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


class Bench(contextlib.ExitStack):
    """Makes processes and paths, all gone when it is left."""

    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds
        self._directory = self.enter_context(tempfile.TemporaryDirectory())
        self._numbers = itertools.count()

    def path(self):
        return os.path.join(self._directory, str(next(self._numbers)))

    def apart(self):
        """Another, whose processes are gone sooner."""
        return Bench(self.rounds)

    def remote(self, cls, system=''):
        return self.enter_context(contextlib.closing(Remote(
            cls, [peers.old_path] if system.startswith(peers.OLD) else [])))

    def publisher(self, system, path, large):
        """What is to publish there; a follower finds a leader."""
        if system.endswith('follower'):
            self.remote(peers.Publisher, system).open(
                'unix', path, 0, large)
            peers.Unix().subscriber(path, 0).close()    # it is served
        return self.remote(peers.Publisher, system)

    def pair(self, system, count, large=True):
        """A publisher and its subscribers, all of whom are seen to receive.

        :param large: whether all of a burst has to be kept
        """
        path = self.path()
        publisher = self.publisher(system, path, large)
        subscribers = self.remote(peers.Subscribers)
        publisher.begin('open', system, path, count, large)
        subscribers.begin('open', system, path, count)
        publisher.end()
        if system == 'floor':
            publisher.burst(1)      # accepts them
        subscribers.end()
        for _ in range(50):
            publisher.burst(1)      # ZeroMQ's and nng's come when they come
            if subscribers.take(count, 0.2)[1] >= count:
                break
        else:
            raise RuntimeError('%s: not all is received' % system)
        subscribers.take(10 ** 9, 0.1)      # what came late
        return publisher, subscribers

    def compare(self, cases, measure, times=1):
        """What each costs, by what was measured, by label, by round.

        :param cases: by label, a system and a number of subscribers
        :param measure: yields (what, value) for a publisher, its subscribers
                        and their number
        :param times: how many rounds there are in one, of what is short
        """
        rounds = self.rounds * times
        costs = collections.defaultdict(
            lambda: collections.defaultdict(dict))
        with self.apart() as apart:
            pairs = {}
            for label, (system, count) in cases.items():
                progress(label)
                pairs[label] = (*apart.pair(system, count), count)
            for number in range(1 + rounds):
                # By turns, for what came before may leave its traces.
                for label, pair in list(pairs.items())[::number % 2 * 2 - 1]:
                    progress('%s, round %d of %d' % (
                        label, number, rounds))
                    for what, value in measure(*pair):
                        if number:      # else it is the warm-up
                            costs[what][label][number] = value
        return costs


def switches(pid):
    """Context switches of all threads of a process so far."""
    count = 0
    for path in glob.glob('/proc/%d/task/*/status' % pid):
        with open(path) as status:
            count += sum(int(line.split()[1]) for line in status
                         if 'ctxt_switches' in line)
    return count


def peak(pid, anew=False):
    """Bytes of memory, at most, since it was last asked for anew."""
    if anew:
        with open('/proc/%d/clear_refs' % pid, 'w') as control:
            control.write('5')
    with open('/proc/%d/status' % pid) as status:
        fields = dict(line.split(':', 1) for line in status)
    return int(fields['VmHWM'].split()[0]) * 1024


# -- points -----------------------------------------------------------------

AGAINST = ' / ' + peers.OLD     # in the name of what has a ratio

Row = collections.namedtuple('Row', 'what values unit limit')


def label(system, count):
    return '%s, %d' % (system, count)


def cases(systems, count):
    """Those that there are, by label, with so many subscribers."""
    return {label(each, count): (each, count) for each in systems
            if peers.available(each, count)}


def rows(costs, unit, limits):
    """The costs, and ratios within rounds to others, with targets, if any."""
    for what, values in costs.items():
        yield Row(what, list(values.values()), unit, None)
    old = {(what, peers.OLD + what): None for what in costs}
    for (one, other), limit in (limits | old).items():
        both = costs.get(one, {}).keys() & costs.get(other, {}).keys()
        if both:
            yield Row('%s / %s' % (one, other), [
                costs[one][number] / costs[other][number] for number in both],
                unit.partition(', ')[2], limit)


def beside_zmq(count, limit):
    """The limits of both kinds of our processes; one for the leader."""
    return {(label(each, count), label('zmq', count)):
            limit if each == 'unix' else None for each in peers.OURS}


def lost(costs):
    """Where anything was lost that was not to be."""
    for what, values in costs.pop('% lost', {}).items():
        if any(values.values()):
            yield Row(what + ': lost', list(values.values()), '%',
                      0 if what.startswith(peers.OURS) else None)


def burst(publisher, subscribers, count):
    before = publisher.cpu()
    subscribers.begin('take', BURST * count)
    yield 'us', publisher.burst(BURST) * 1e6
    yield '% lost', missed(subscribers.end()[1], BURST * count)
    yield 'us, CPU', (publisher.cpu() - before) / BURST * 1e6


def missed(got, total):
    """Per cent that did not come."""
    return 100 - 100 * got / total if total else 0


def call(bench):
    """One call in a burst, beside peers, by number of subscribers."""
    for count in (0, *COUNTS):
        chosen = cases(peers.BROADCAST if count else QUEUES, count)
        limits = beside_zmq(count, 0.5 if count else None)
        if count <= 1:
            chosen.update(cases(peers.YARDSTICKS, 0))
            ours = label('unix', count)
            limits.update({
                (label('follower', count), ours): 1.3 if count else 1.5,
                (ours, 'log, 0'): 0.15 if count else 0.01,
                (ours, 'log unmasked, 0'): None})
        if count == 1:
            limits[ours, 'json, 0'] = 1.5
        costs = bench.compare(chosen, burst, BURSTS)
        yield from lost(costs)
        yield from rows(costs['us'], 'us', limits)
        yield from rows(costs['us, CPU'], 'us, CPU', {})


def crowd(bench):
    """A burst with a hundred subscribers, as against one."""
    chosen = dict(cases(['unix'], 1), **cases(['unix'], 100))
    costs = bench.compare(chosen, burst, BURSTS)
    yield from lost(costs)
    yield from rows(costs['us'], 'us', {tuple(chosen)[::-1]: 1.3})


def percentile(values, rank):
    return sorted(values)[len(values) * rank // 100]


def at_rate(publisher, subscribers, count, method='paced', number=PACED,
            rate=RATE):
    before = publisher.cpu()
    subscribers.begin('delays', number * count)
    calls = getattr(publisher, method)(number, rate)
    delays, got = subscribers.end()
    yield '% lost', missed(got, number * count)
    if method == 'paced':
        yield 'us, CPU', (publisher.cpu() - before) / number * 1e6
    for what, found in ('call', calls), ('end to end', delays):
        for rank in (50, 99) if found else ():
            yield 'us, %s p%d' % (what, rank), percentile(found, rank) * 1e6


def paced(bench):
    """A call, and the way to a subscriber, at 1000 a second."""
    for count in (0, *COUNTS):
        costs = bench.compare(cases(
            peers.BROADCAST if count else ('log', *QUEUES), count), at_rate)
        yield from lost(costs)
        for what, found in costs.items():
            limits = beside_zmq(count, {
                'us, call p50': 1 if count else None,
                'us, end to end p50': 0.8 if count == 10 else 1}.get(what))
            if what == 'us, end to end p50' and count == 1:
                limits['follower, 1', 'unix, 1'] = 2.5
            yield from rows(found, what, limits)


def busy(bench):
    """The same from a process with a thread that never rests.

    A loop that is a thread waits for the GIL, 5 ms each time; the threads of
    ZeroMQ and nng, and a send by the caller, do not.
    """
    measure = functools.partial(at_rate, method='beside_busy', number=BUSY,
                                rate=BUSY_RATE)
    for count in COUNTS[:2]:
        costs = bench.compare(cases(QUEUES, count), measure)
        yield from lost(costs)
        for what, found in costs.items():
            yield from rows(found, what, beside_zmq(count, {
                'us, end to end p50': 0.8, 'us, end to end p99': 1
            }.get(what) if count == 1 else None))


def flat_out(publisher, subscribers, count):
    many = max(1000, MANY // count)
    subscribers.begin('take', many * count, 2)
    begin = time.monotonic()
    publisher.burst(many)
    last, got = subscribers.end()
    yield '% lost', missed(got, many * count)
    if got == many * count:
        yield 'us/message', (last - begin) / many * 1e6


def throughput(bench):
    """Microseconds for a message that reaches all, flat out, none lost."""
    for count in COUNTS:
        costs = bench.compare(cases(peers.BROADCAST, count), flat_out,
                              FLATS)
        yield from lost(costs)
        yield from rows(costs['us/message'], 'us/message',
                        beside_zmq(count, 1 / 1.5))


def workers(bench):
    """All processes flat out into one subscriber, against one alone."""
    costs = collections.defaultdict(dict)
    for number, count, system in itertools.product(
            range(bench.rounds), (1, WORKERS),
            filter(peers.available, ('unix', peers.OLD + 'unix'))):
        what = system.replace('unix', '%d publishing' % count)
        progress('%s, round %d of %d' % (what, number + 1, bench.rounds))
        with bench.apart() as apart:
            costs[what][number] = together(apart, system, count)
    return rows(costs, 'us/message', {
        ('%d publishing' % WORKERS, '1 publishing'): 1})


def together(bench, system, count):
    """Microseconds for a message of so many publishers of one path."""
    path = bench.path()
    publishers = [bench.publisher(system, path, True) for _ in range(count)]
    for each in publishers:
        each.open(system, path, 1, True)
    subscriber = bench.remote(peers.Subscribers)
    subscriber.open('unix', path, 1)
    for each in publishers:
        each.burst(100)
    subscriber.take(100 * count)
    subscriber.begin('take', MANY // count * count)
    begin = time.monotonic()
    for each in publishers:
        each.begin('burst', MANY // count)
    for each in publishers:
        each.end()
    last, got = subscriber.end()
    if got < MANY // count * count:
        raise RuntimeError('not all was received')
    return (last - begin) / got * 1e6


def stalled(bench):
    """What a healthy one lacks beside one that is stopped; memory."""
    for system in filter(peers.available, ('unix', 'zmq', 'nng')):
        progress(system)
        with bench.apart() as apart:
            path = apart.path()
            publisher = apart.remote(peers.Publisher)
            publisher.open(system, path, 2)
            healthy, stopped = (apart.remote(peers.Subscribers)
                                for _ in range(2))
            healthy.open(system, path, 1)
            stopped.open(system, path, 1)
            publisher.paced(300, 1000)
            healthy.take(10 ** 9, 0.5)
            # The process, for libraries read in threads of their own.
            os.kill(stopped.process.pid, signal.SIGSTOP)
            before = peak(publisher.process.pid, anew=True)
            healthy.begin('take', MANY, 2)
            publisher.paced(MANY, 5000)
            yield Row(system + ': lacking', [MANY - healthy.end()[1]], '',
                      0 if system == 'unix' else None)
            yield growth(system, before, publisher)
            os.kill(stopped.process.pid, signal.SIGCONT)


def growth(system, before, publisher):
    return Row(system + ': memory', [
        (peak(publisher.process.pid) - before) / peers.MIB], 'MiB',
        BUFFER // peers.MIB + 4 if system == 'unix' else None)


def lag(bench):
    """A subscriber that never reads, and a publisher that never rests."""
    publisher, _ = bench.pair('unix', 1, large=False)
    before = peak(publisher.process.pid, anew=True)
    progress('%d calls' % LAG)
    publisher.burst(LAG)
    yield growth('unix', before, publisher)


def joining(publisher, subscribers, count):
    publisher.begin('paced', *JOINED)
    gaps = subscribers.join(JOINS)
    publisher.end()
    yield 'ms, mean', statistics.mean(gaps) * 1e3
    yield 'ms, worst', max(gaps) * 1e3


def join(bench):
    """Milliseconds after connect() of which nothing is received.

    One is emitted each half of a millisecond: half of that is the best mean.
    """
    for what, found in bench.compare(cases(QUEUES, 0), joining).items():
        yield from rows(found, what, {})


def idle(bench):
    """Context switches of a publisher with one subscriber, of nothing."""
    for system in filter(peers.available, QUEUES):
        with bench.apart() as apart:
            publisher, _ = apart.pair(system, 1)
            time.sleep(2)
            before = switches(publisher.process.pid)
            progress('%s, %d seconds' % (system, IDLE))
            time.sleep(IDLE)
            yield Row('%s: switches in %d s' % (system, IDLE),
                      [switches(publisher.process.pid) - before], '',
                      0 if system in peers.OURS else None)


def last_act(bench):
    """Per cent lost of what a process emits before it is gone at once."""
    for system in filter(peers.available, peers.ALL_OURS):
        with bench.apart() as apart:
            path = apart.path()
            publisher = apart.publisher(system, path, large=False)
            for end, count in itertools.product(ENDS, LAST):
                what = '%s: %d, %s' % (system, count, end)
                progress(what)
                got = sum(publisher.last_act(system, path, count, end)
                          for _ in range(ACTS))
                yield Row(what, [missed(got, ACTS * count)], '% lost',
                          0 if system in peers.OURS else None)


def hand_on(bench):
    """Milliseconds for which a subscriber hears nothing amid a hand-on.

    Of four processes that emit once in a millisecond the leader leaves.
    """
    if not peers.available('unix'):
        return
    directory = bench.path()
    os.mkdir(directory)
    path = os.path.join(directory, 's')
    nursery = bench.enter_context(contextlib.closing(
        base.Publisher(directory, {'path': path})))
    crew = dict(newcomer(directory, nursery) for _ in range(CREW))
    times, stays, ended = [], [], threading.Event()
    sock = bench.enter_context(socket.socket(socket.AF_UNIX))
    base.wait_until(lambda: not sock.connect_ex(path), 'it is served')
    threading.Thread(target=hear, args=(sock, times, ended),
                     daemon=True).start()
    for number in range(bench.rounds * HAND_ONS):
        progress('hand-on %d' % number)
        stays.append(leave(path, crew, nursery))
        crew.update([newcomer(directory, nursery)])
    pauses = [1e3 * max(after - before for before, after in zip(
        times, times[1:]) if begin < after < end) for begin, end in stays]
    yield Row('unix: streams ended', [ended.is_set()], '', 0)
    for rank, limit in (50, None), (99, 20):
        yield Row('unix: p%d' % rank, [percentile(pauses, rank)], 'ms', limit)


def hear(sock, times, ended):
    """Note when something comes, until the stream ends, or we close it."""
    with contextlib.suppress(OSError):
        while sock.recv(peers.MIB):
            times.append(time.monotonic())
    ended.set()


def leave(path, crew, nursery):
    """Have the leader leave; since when, and until when it took to end."""
    leader = base.wait_until(
        lambda: crew.pop(base.leader_pid(path), None), 'one leads')
    begin = time.monotonic()
    leader.tell('leave')
    nursery.ask('reap', pid=leader.pid)
    return begin, time.monotonic()


def newcomer(directory, nursery):
    """A process that emits, by its pid."""
    child = base.fork(directory, nursery, 'fork')
    child.ask('open')
    child.ask('start', pause=0.001)
    return child.pid, child


def cycle(items, count):
    return itertools.islice(itertools.cycle(items), count)


class Source:
    """Sends the same bytes to whoever connects, as fast as they are read."""

    def open(self, path, count):
        self._data = b''.join(json.dumps(each).encode() + b'\n'
                              for each in cycle(peers.messages(), count))
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
                 for each in cycle(peers.messages(), count)]
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
        for each in cycle(peers.messages(), count):
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
        assert done.wait(peers.PATIENCE * 10)
        seconds = time.perf_counter() - begin
        server.stop()
        server.wait()
        return seconds


def consumers(bench):
    """A message at a subscriber of ours, as against what it must cost."""
    source, consumer = bench.remote(Source), bench.remote(Consumer)
    path, count = bench.path(), 5 * BURST
    source.open(path, count)
    costs = collections.defaultdict(dict)
    for number in range(1 + bench.rounds):
        progress('round %d of %d' % (number, bench.rounds))
        for what in ('json', 'subscribe', 'fake', 'unix'):
            seconds = getattr(consumer, what)(path, count)
            if number:
                costs[what][number] = seconds / count * 1e6
    return rows(costs, 'us', {('subscribe', 'json'): 1.25,
                              ('unix', 'fake'): 1.25})


POINTS = {each.__name__: each
          for each in (call, crowd, paced, busy, throughput, workers, stalled,
                       lag, join, idle, last_act, hand_on, consumers)}


# -- output -----------------------------------------------------------------

def progress(text):
    print('  %-40s' % text, end='\r', file=sys.stderr, flush=True)


def finish(point, row, tolerance):
    """A row as it is printed, with median and verdict."""
    middle = statistics.median(row.values)
    if AGAINST in row.what and (
            point == 'busy' or not row.unit.endswith(('p99', 'worst'))):
        row = row._replace(limit=tolerance)
    verdict = None if row.limit is None else (
        'met' if middle <= row.limit else 'missed')
    return dict(row._asdict(), point=point, median=middle, verdict=verdict)


def table(rows):
    line = '%-10s  %-33s  %-24s  %-17s  %-8s  %s'
    yield line % ('point', 'what', 'median', 'lowest - highest', 'target',
                  'verdict')
    for row in rows:
        values, limit = row['values'], row['limit']
        yield line % (
            row['point'], row['what'],
            '%.4g %s' % (row['median'], row['unit']), '' if len(values) == 1
            else '%.4g - %.4g' % (min(values), max(values)),
            '' if limit is None else '<= %g' % limit, row['verdict'] or '')


def chart(path, rows, title):
    """Draw who takes how long: an SVG file, by matplotlib."""
    import matplotlib
    matplotlib.use('svg')
    from matplotlib import pyplot
    kinds = [('call', 'us', 'a call in a burst'),
             ('paced', 'us, call p50', 'a call at 1000/s, p50'),
             ('paced', 'us, end to end p50', 'end to end at 1000/s, p50'),
             ('throughput', 'us/message', 'a message flat out, none lost')]
    names = list(filter(peers.available, peers.BROADCAST))
    width = 1 / (len(names) + 1)
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4), sharey=True)
    for axis, (point, unit, what) in zip(axes, kinds):
        found = {row['what']: row['median'] for row in rows
                 if (row['point'], row['unit']) == (point, unit)}
        for index, name in enumerate(names):
            values = [found.get(label(name, count)) or 0
                      for count in COUNTS]
            if not any(values):
                continue
            axis.bar([at + index * width for at in range(3)], values, width,
                     label=name)
        axis.set(title=what, yscale='log', xlabel='subscribers')
        axis.set_xticks([at + 0.3 for at in range(3)], COUNTS)
    axes[0].set_ylabel('microseconds')
    axes[-1].legend(loc='upper left', bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


@contextlib.contextmanager
def older(revision):
    """A directory with the module as it was, if a revision is given."""
    if revision is None:
        yield None
        return
    source = subprocess.check_output(
        ['git', 'show', revision + ':./../unix_notifier.py'],
        cwd=os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory() as path:
        with open(os.path.join(path, 'unix_notifier.py'), 'wb') as file:
            file.write(source)
        yield path


def measure(names, rounds, tolerance):
    for name in names:
        print('%s: %s' % (name, POINTS[name].__doc__.splitlines()[0]),
              file=sys.stderr)
        with Bench(rounds) as bench:
            for row in POINTS[name](bench):
                yield finish(name, row, tolerance)
        progress('')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0])
    parser.add_argument('--only', metavar='POINT', nargs='+', choices=POINTS,
                        help='any of: ' + ', '.join(POINTS))
    parser.add_argument('--rounds', type=int, default=7,
                        help='the default is %(default)s')
    parser.add_argument('--json', action='store_true',
                        help='print one JSON object for each row')
    parser.add_argument('--chart', metavar='FILE',
                        help='draw the comparison with peers, as SVG')
    parser.add_argument('--systems', nargs='+', choices=peers.SYSTEMS,
                        default=peers.SYSTEMS, metavar='SYSTEM',
                        help='any of: ' + ', '.join(peers.SYSTEMS))
    parser.add_argument('--against', metavar='REVISION', help='compare with '
                        'this older build, too, by turns: "old"')
    parser.add_argument('--tolerance', type=float, default=1.05,
                        help='what the ratio to it may be: %(default)s')
    parser.add_argument('--rabbit', metavar='URL', help='compare with '
                        'RabbitMQ, too: rabbit://user:password@host:port/')
    arguments = parser.parse_args()
    if arguments.rabbit:
        os.environ[peers.RABBIT] = arguments.rabbit
    # And what ours are to be compared with, if with an older build.
    peers.chosen.intersection_update([*arguments.systems, *(
        peers.OLD + each for each in arguments.systems if each in peers.OURS)])
    done = []
    with older(arguments.against) as peers.old_path:
        for row in measure(arguments.only or POINTS, arguments.rounds,
                           arguments.tolerance):
            done.append(row)
            if arguments.json:
                print(json.dumps(row), flush=True)
    machine = 'Python %s, %d cores, Linux %s; load %.1f' % (
        platform.python_version(), os.cpu_count(),
        platform.release().partition('-')[0],
        os.getloadavg()[0])
    if arguments.chart:
        chart(arguments.chart, done, machine)
    if not arguments.json:
        print(machine)
        ratios = [row for row in done if AGAINST in row['what']]
        print('\n'.join(table(row for row in done if row not in ratios)))
        if ratios:
            print('\nThis build, as against %s' % arguments.against)
            print('\n'.join(table(ratios)))


if __name__ == '__main__':
    main()
