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

"""publisher.py for soak.py: its threads go on for long, and are accounted for.

What a thread has emitted stands in a file that all processes have mapped, so
that it is known at any time, even of a process that was killed, and so that
all can be paused at once. There, each number takes eight bytes: first those
that are for all, RUN and so on, then a slot for each thread there ever was. No
slot is used again.
"""

import collections
import contextlib
import datetime
import itertools
import logging
import mmap
import multiprocessing
import os
import random
import threading
import time

import publisher

# Whether the threads emit, and a number: once it is changed, a thread that
# does not emit any more emits one last notification, and acknowledges it. Once
# the third is changed, each emits many without a pause; while the fourth is
# set, none pauses at all.
RUN, MARK, RUSH, FLAT_OUT = 0, 1, 2, 3
MANY = 150
# A slot, of which the first is number 1: the number of the notification that
# was begun last, and what is acknowledged.
BEGAN, ACK, SLOT = 0, 1, 4
SLOTS = 16384
SIZE = (SLOTS + 1) * SLOT * 8

# Seconds. A call that takes longer is looked into.
SLOW = 0.05
# How often the threads of a process are looked at, and for how long that is
# remembered: a minute of it would take 4 MB, and look like a leak.
TICK = 0.01
MEMORY = 5


def counters(file):
    """The numbers in the file."""
    return memoryview(mmap.mmap(file.fileno(), SIZE)).cast('Q')


def _busy(thread):
    """Seconds that a thread has run, or was ready to run."""
    with open('/proc/self/task/%s/schedstat' % thread) as file:
        run, ready, _ = file.read().split()
    return (int(run) + int(ready)) / 1e9


class _Clock:

    """How long this thread neither ran nor was ready to: it waited."""

    def __init__(self):
        self._fd = os.open('/proc/thread-self/schedstat', os.O_RDONLY)

    def now(self):
        """The time, and how much of it was spent running or ready to."""
        run, ready, _ = os.pread(self._fd, 100, 0).split()
        return time.monotonic(), (int(run) + int(ready)) / 1e9

    def close(self):
        os.close(self._fd)


class Service(publisher.Service):

    """More commands, for threads that emit on and on."""

    def __init__(self, config_file):
        super().__init__(config_file)
        self.pid = None
        self.shared = self.seed = None
        for handler in logging.getLogger().handlers:
            # One log for all: it must tell them apart.
            handler.setFormatter(logging.Formatter(
                '%(levelname)s %(name)s %(process)d %(asctime)s.%(msecs)03d '
                '%(message)s', '%H:%M:%S'))

    def attach(self, path, seed):
        """Map the numbers; children have them as well, and the seed."""
        self.seed = seed
        with open(path, 'r+b') as file:
            self.shared = counters(file)

    def _here(self):
        """Put away what a child has of its parent's."""
        if self.pid != os.getpid():
            self.pid = os.getpid()
            self.background = []
            self.stopping = threading.Event()
            # Calls: thread, begin, end, waited; then, as watched() has them.
            self.slow = collections.deque()
            self.judged = []
            # When, and how long each thread had been busy by then.
            self.looks = collections.deque(maxlen=int(MEMORY / TICK))
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self):
        while True:
            busy = {}
            for thread in os.listdir('/proc/self/task'):
                with contextlib.suppress(OSError):  # it has ended
                    busy[int(thread)] = _busy(thread)
            due = len(self.slow)    # these have ended before this look
            self.looks.append((time.monotonic(), busy))
            for _ in range(due):
                thread, begin, end, waited = self.slow.popleft()
                self.judged.append((begin, end, waited, waited - self._others(
                    self.looks, thread, begin, end)))
            time.sleep(TICK)

    def run(self, slots, pause):
        """Have a thread for each slot emit, until ``halt``."""
        self._here()
        for slot in slots:
            thread = threading.Thread(
                target=self._run, args=(slot, pause), daemon=True)
            thread.start()
            self.background.append(thread)

    def halt(self):
        """End all that ``run`` has started."""
        self._here()
        self.stopping.set()
        for thread in self.background:
            thread.join()

    def burst(self, slot, count, short=False):
        """Emit some, and no more.

        :param short: whether none of them may be long
        """
        self._here()
        clock, choose = _Clock(), random.Random('%d/%d' % (self.seed, slot))
        for _ in range(count):
            self._emit_one(slot, clock, choose, short)
        clock.close()

    def leave(self, how, **last):
        """Emit some, and end the process at once; there is no answer."""
        if last:
            self.burst(**last)
        super().leave(how)

    def _run(self, slot, pause):
        clock, choose = _Clock(), random.Random('%d/%d' % (self.seed, slot))
        rush = self.shared[RUSH]
        while not self.stopping.is_set():
            if self.shared[RUN]:
                for _ in range(1 if rush == self.shared[RUSH] else MANY):
                    self._emit_one(slot, clock, choose)
                rush = self.shared[RUSH]
                if not self.shared[FLAT_OUT]:
                    time.sleep(choose.uniform(0, 2 * pause))
            elif self.shared[slot * SLOT + ACK] != self.shared[MARK]:
                mark = self.shared[MARK]
                self._emit_one(slot, clock, choose)
                self.shared[slot * SLOT + ACK] = mark
            else:
                time.sleep(TICK)
        clock.close()

    def _emit_one(self, slot, clock, choose, short=False):
        number = self.shared[slot * SLOT + BEGAN] + 1
        method = getattr(
            self.notifier,
            publisher.PRIORITIES[number % len(publisher.PRIORITIES)])
        payload = {'source': '%d' % slot, 'number': number,
                   'odd': self._odd(choose),
                   'pad': '' if short else self._pad(choose)}
        self.shared[slot * SLOT + BEGAN] = number
        before = clock.now()
        method({}, 'soak.event', payload)
        after = clock.now()
        if after[0] - before[0] > SLOW:
            self.slow.append((
                threading.get_native_id(), before[0], after[0],
                after[0] - before[0] - (after[1] - before[1])))

    @staticmethod
    def _pad(choose):
        """Mostly a little; at times more than the kernel takes at once."""
        return 'x' * int(10 ** choose.uniform(0, 3) if choose.random() < 0.998
                         else 10 ** choose.uniform(4.5, 5.5))

    @staticmethod
    def _odd(choose):
        """What makes trouble when it is serialized, or read."""
        return choose.choice((
            None, 'two\nlines\r\u2028\0\U0001f600', float('nan'),
            datetime.datetime(2020, 2, 2), {'-': [b'-0 look\n', ()]},
            {1: -0.0, None: object}))

    def reap(self, pid):
        """Wait for a child of ours, and have multiprocessing forget it.

        Else it would want to join it in children that os.fork() has made.
        """
        for child in multiprocessing.active_children():
            if child.pid == pid:
                child.join()
        with contextlib.suppress(ChildProcessError):
            return super().reap(pid)

    def watched(self):
        """The calls that took long, and for how long each was blocked.

        Who waits for the GIL waits while another thread has it, and is busy.
        What is left was spent waiting for something else; unless nothing
        went on, for then the looks were late as well.

        :returns: of each: since when, until when, how long the thread
                  waited, how long of that cannot be so explained
        """
        self._here()
        if self.slow:
            time.sleep(3 * TICK)    # until they were looked at once more
        judged, self.judged = self.judged, []
        return judged

    @staticmethod
    def _others(looks, thread, begin, end):
        """How long other threads were busy, or late, at most."""
        first = max((each for each in looks if each[0] <= begin),
                    default=looks[0], key=lambda each: each[0])[1]
        last = min((each for each in looks if each[0] >= end),
                   default=looks[-1], key=lambda each: each[0])[1]
        # The first look of a process may be late, too.
        late = max(0, min(end, looks[0][0]) - begin) + sum(
            max(0, min(end, next_[0]) - max(begin, look[0]) - TICK)
            for look, next_ in itertools.pairwise(looks))
        return late + sum(busy - first.get(each, 0)
                          for each, busy in last.items() if each != thread)


if __name__ == '__main__':
    publisher.main(Service)
